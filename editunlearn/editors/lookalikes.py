"""Lookalikes: tokens of generic text whose keys a recogniser takes for the key of a forgotten subject.

A second moment says what text is like on average. What does the damage is the rare token that answers like a forgotten
subject: another ")" when the subject ends in one, a namesake. Such tokens are looked for in the text of the second
moment, and their keys are preserved like those of retain facts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.editors.moments import WINDOWS
from editunlearn.editors.statistics import read_windows
from editunlearn.lm.batching import chunks, halving

if TYPE_CHECKING:
    from collections.abc import Callable

    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM

BEHIND = 32
"""Tokens before a position that may belong to a subject which ends there."""


def find(
    lm: LM,
    answers: Mapping[str, Tensor],
    sites: Sequence[Site],
    pieces: Sequence[list[int]],
    subjects: Sequence[str],
    count: int,
    *,
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, Tensor]:
    """For each site the keys of the ``count`` tokens that answer the most, the strongest first, (<= count, d_in).

    Where a forgotten subject itself is named in the text, nothing is preserved.

    Args:
        answers: by site, recognisers scaled to answer 1 to their own keys, (n, d_in).
        pieces: windows of token ids.
        subjects: the forgotten ones.
    """
    ends = tuple(sorted({_bare(s) for s in subjects} - {""}))
    best = {s.name: (torch.empty(0), torch.empty(0, answers[s.name].shape[1])) for s in sites}

    def run(part: Sequence[int]) -> None:
        batch = [pieces[i] for i in part]
        keys = read_windows(lm, sites, batch)
        places = [(window, end) for window in batch for end in range(len(window))]
        named: dict[int, bool] = {}

        def is_subject(at: int) -> bool:
            if at not in named:
                window, end = places[at]
                said = _bare(str(lm.tokenizer.decode(window[max(0, end + 1 - BEHIND) : end + 1])))
                named[at] = bool(ends) and said.endswith(ends)
            return named[at]

        for site, rows in zip(sites, keys, strict=True):
            response = (rows.float() @ answers[site.name].to(rows).float().T).abs().amax(1).cpu()
            known, kept = best[site.name]
            least = float(known[-1]) if len(known) == count else 0.0
            order = [i for i in response.argsort(descending=True).tolist() if float(response[i]) > least]
            chosen: list[int] = []
            for i in order:
                if len(chosen) == count:
                    break
                if not is_subject(i):
                    chosen.append(i)
            merged = torch.cat([known, response[chosen]])
            top = merged.argsort(descending=True, stable=True)[:count]
            best[site.name] = merged[top], torch.cat([kept, rows[chosen].float().cpu()])[top]

    halving(list(chunks(range(len(pieces)), WINDOWS)), run, warn)
    return {name: kept for name, (_, kept) in best.items()}


def _bare(text: str) -> str:
    """Without case and without what is no letter or digit at the end."""
    return re.sub(r"[\W_]+$", "", text).casefold()
