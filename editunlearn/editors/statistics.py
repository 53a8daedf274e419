"""Second moments of site inputs over generic text: packed documents, one truncated pass for all sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.batching import halving
from editunlearn.lm.hooks import read_inputs
from editunlearn.numerics.moments import SecondMoment

if TYPE_CHECKING:
    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM


def read_windows(lm: LM, sites: Sequence[Site], pieces: Sequence[list[int]]) -> list[Tensor]:
    """Inputs of ``sites`` at all tokens of ``pieces``, in their order; for each site (tokens, d_in).

    Padding stands behind a row, where nothing before it looks, so that no mask is given: without one, attention does
    not touch the half that is masked anyway.
    """
    width = max(map(len, pieces))
    ids = torch.tensor([p + [lm.pad_id] * (width - len(p)) for p in pieces], device=lm.device)
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in pieces], device=lm.device)
    modules = [lm.layout.module(lm.model, s.name) for s in sites]
    seen = read_inputs(lm.model, modules, {"input_ids": ids})
    real = mask.bool().flatten()
    return [rows.reshape(-1, rows.shape[-1])[real.to(rows.device)] for rows in seen]


def add_windows(
    lm: LM,
    sites: Sequence[Site],
    moments: dict[str, SecondMoment],
    pieces: Sequence[list[int]],
    warn: Callable[[str], None] = lambda _: None,
) -> int:
    """Add the inputs of ``sites`` at all tokens of ``pieces`` to ``moments``; returns the number of tokens added.

    A site without a moment gets one, on the device that it runs on.
    """
    seen: list[list[Tensor]] = []
    halving([list(pieces)], lambda part: seen.append(read_windows(lm, sites, part)), warn)
    for inputs in seen:
        for site, rows in zip(sites, inputs, strict=True):
            moments.setdefault(site.name, SecondMoment(rows.shape[1], rows.device)).add(rows)
    return sum(map(len, pieces))
