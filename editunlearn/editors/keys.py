"""Keys: what enters an edited projection at the lookup token of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.hooks import read_inputs
from editunlearn.lm.tokens import Row, batch, until_lookup

if TYPE_CHECKING:
    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM


def collect(
    lm: LM, rows: Sequence[Row], sites: Sequence[Site], *, warn: Callable[[str], None] = lambda _: None
) -> dict[str, Tensor]:
    """Input of each site at each row's lookup token, in one truncated pass for all sites.

    What stands behind the lookup token cannot matter to it, and is not run.

    Returns:
        site name -> (len(rows), d_in) float32 on the CPU, rows in the given order.
    """
    return at_tokens(lm, [(until_lookup(row), (row.lookup,)) for row in rows], sites, warn=warn)


def at_tokens(
    lm: LM,
    wanted: Sequence[tuple[Row, Sequence[int]]],
    sites: Sequence[Site],
    *,
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Input of each site at some tokens of each row, never at padding.

    Args:
        wanted: rows, and the indices of their tokens.

    Returns:
        site name -> (number of tokens, d_in) float32 on the CPU, row after row.
    """
    modules = [lm.layout.module(lm.model, s.name) for s in sites]
    found: dict[str, dict[int, Tensor]] = {s.name: {} for s in sites}

    def run(part: Sequence[int]) -> None:
        padded = batch([wanted[i][0] for i in part], lm.pad_id, lm.device)
        counts = [len(wanted[i][1]) for i in part]
        places = [place for place, count in enumerate(counts) for _ in range(count)]
        tokens = [token for i in part for token in wanted[i][1]]
        inputs = read_inputs(lm.model, modules, padded.inputs)
        for site, seen in zip(sites, inputs, strict=True):
            states = seen.reshape(*padded.input_ids.shape, -1)
            of_rows = torch.split(states[places, tokens].float().cpu(), counts)
            found[site.name] |= dict(zip(part, of_rows, strict=True))

    halving(by_length([len(row.ids) for row, _ in wanted]), run, warn)
    return {name: torch.cat([keys[i] for i in range(len(wanted))]) for name, keys in found.items()}


def average(keys: Tensor, facts: int, *, bare_weight: float = 0.5) -> Tensor:
    """One key per fact from one per context, (facts, d_in).

    Args:
        keys: (facts * contexts, d_in), fact-major, the bare prompt first.
        bare_weight: share of the bare prompt; the prefixed ones divide the rest (MEMIT averages by group of
            templates, which gives 1/2).
    """
    grouped = keys.reshape(facts, -1, keys.shape[-1])
    if grouped.shape[1] == 1:
        return grouped[:, 0]
    return bare_weight * grouped[:, 0] + (1 - bare_weight) * grouped[:, 1:].mean(1)
