"""What of an answer can be read inside a model that no longer says it: a part of ``facts:attacks``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editunlearn.evaluation.attacks.probing import Lens, logit_lens
from editunlearn.evaluation.results import Item
from editunlearn.evaluation.suites import Part
from editunlearn.lm.tokens import Prompt, Row, encode

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

WITHIN = (1, 10)
"""Among how many likeliest tokens the answer's first one counts as read."""
POSITIONS, LENGTH = 4, 128
"""Positions of text for the probe, as a multiple of the model's width; tokens of one passage."""


@dataclass
class Inside(Part):
    """Whether the answer's first token is among the likeliest after any block, by the logit lens and a linear probe.

    Attributes:
        text: passages that the probe is fitted on.
        blocks: of the model.
    """

    text: Sequence[str] = ()
    blocks: int = 0

    @property
    def looks(self) -> int:
        """See :class:`Part`."""
        return 2 * self.blocks

    def items(self, lm: LM, progress: Callable[[int], None]) -> list[Item]:
        """See :class:`Part`."""
        rows = [encode(lm, p.prompt, p.answer, "prompt_last") for p in self.probes if p.prompt is not None]
        plain = logit_lens(lm, rows, done=progress)
        probed = logit_lens(lm, rows, self._passages(lm), done=progress)
        values = [{**_values("lens", plain, i), **_values("probe", probed, i)} for i in range(len(rows))]
        return [Item(p.shown, p.answer, None, p.group, v) for p, v in zip(self.probes, values, strict=True)]

    def _passages(self, lm: LM) -> list[Row]:
        wanted = POSITIONS * int(lm.head.weight.shape[1])  # type: ignore[index]
        rows: list[Row] = []
        for text in self.text:
            ids = encode(lm, Prompt(text, (0, 0)), None, "prompt_last").ids[:LENGTH]
            if wanted > 0 and len(ids) > 1:
                rows.append(Row(ids, 0, 1))
                wanted -= len(ids) - 1
        return rows


def _values(name: str, lens: Lens, row: int) -> dict[str, float]:
    return {f"{name}_top{k}": float(lens.readable(k)[row]) for k in WITHIN}
