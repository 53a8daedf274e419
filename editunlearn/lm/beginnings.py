"""Rows that begin alike: what they share is run once, and each row goes on from its keys and values.

Facts stand behind the same few context prefixes, so that most of the tokens before their subjects are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editunlearn.lm.tokens import Batch, Row, batch

WORTH = 0.2
"""Share of all tokens that must be saved: a pass more costs something, too."""


def shared(rows: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens at the beginning of each row are to be run together with those of other rows.

    In the tree of beginnings, every branch is taken together or divided into its own branches, whichever leaves fewer
    tokens to run. Rows that share nothing get 0; all get 0 where too little would be saved.
    """
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    alike = [_alike(rows[one], rows[other]) for one, other in zip(order, order[1:], strict=False)]
    found = [0] * len(rows)
    saved, runs = _best(alike, 0, len(rows))
    if saved < WORTH * sum(map(len, rows)):
        return found
    for start, end, length in runs:
        for i in order[start:end]:
            found[i] = length
    return found


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _best(alike: Sequence[int], start: int, end: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Tokens saved in the sorted rows ``start`` to ``end``, and the runs: start, end, length of their beginning."""
    if end - start < 2:
        return 0, []
    length = min(alike[start : end - 1])
    cuts = [start, *(i + 1 for i in range(start, end - 1) if alike[i] == length), end]
    parts = [_best(alike, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    apart = sum(saved for saved, _ in parts)
    together = (end - start - 1) * length
    if together >= apart and length > 0:
        return together, [(start, end, length)]
    return apart, [run for _, runs in parts for run in runs]


@dataclass(frozen=True)
class Beginnings:
    """The distinct beginnings of some rows.

    Attributes:
        padded: the beginnings; None when nothing is shared.
        of: (rows,) number of each row's beginning; any for a row without one.
        lengths: of each row's beginning, 0 for none.
    """

    padded: Batch | None
    of: Tensor
    lengths: list[int]

    @classmethod
    def alone(cls, count: int) -> Beginnings:
        """Of rows that share nothing."""
        return cls(None, torch.zeros(count, dtype=torch.long), [0] * count)

    @classmethod
    def find(cls, rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Beginnings:
        """Those of ``rows``, token ids of which at least the last is not to be shared."""
        lengths = shared([row[:-1] for row in rows])
        distinct = sorted({tuple(row[:n]) for row, n in zip(rows, lengths, strict=True) if n})
        if not distinct:
            return cls.alone(len(rows))
        number = {ids: i for i, ids in enumerate(distinct)}
        of = torch.tensor([number.get(tuple(row[:n]), 0) for row, n in zip(rows, lengths, strict=True)])
        padded = batch([Row(ids, 0, len(ids)) for ids in distinct], pad_id, device)
        return cls(padded, of, lengths)

    @property
    def width(self) -> int:
        """Tokens of the longest."""
        return 0 if self.padded is None else int(self.padded.input_ids.shape[1])

    def mask(self, device: torch.device) -> Tensor:
        """Attention mask of each row's beginning, (rows, width)."""
        if self.padded is None:
            return torch.zeros(len(self.of), 0, dtype=torch.long, device=device)
        own = torch.tensor([n > 0 for n in self.lengths], device=device)
        return self.padded.attention_mask[self.of.to(device)] * own[:, None]
