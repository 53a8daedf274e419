"""How likely a model finds given continuations, and whether it would write them itself (teacher-forced)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.head import Head, hidden_of
from editunlearn.lm.hooks import at_scored_positions, first_tensor
from editunlearn.lm.tokens import Batch, Row, batch
from editunlearn.numerics import losses

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

SCORED_TOKENS = 2048
"""Padded tokens of one scoring batch; bounds the logits that are in memory at once."""


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        log_probability: natural logarithm, summed over its tokens (the closing token not counted).
        tokens: how many.
        greedy: True when every token is the most likely one, so that greedy decoding writes it.
    """

    log_probability: float
    tokens: int
    greedy: bool


def target_logits(lm: LM, padded: Batch) -> Tensor:
    """Logits that predict the target tokens of a batch, (number of target tokens, vocabulary)."""
    with at_scored_positions(lm.head, padded.targets):
        return first_tensor(lm.model(**padded.inputs, use_cache=False).logits).squeeze(0).to(lm.device)


@torch.no_grad()
def score(lm: LM, rows: Sequence[Row], *, closed: bool = True) -> list[Likelihood]:
    """Likelihood of the target part of each row.

    Args:
        closed: the rows end with a closing token, which is left out of the score.
    """
    results: list[Likelihood | None] = [None] * len(rows)

    def run(part: Sequence[int]) -> None:
        padded = batch([rows[i] for i in part], lm.pad_id, lm.device)
        logits = target_logits(lm, padded).float()
        log_p = -losses.cross_entropy(logits, padded.labels)
        best = logits.argmax(-1) == padded.labels
        for k, i in enumerate(part):
            mine = (padded.owners == k).nonzero()[:, 0]
            mine = mine[:-1] if closed else mine
            results[i] = Likelihood(float(log_p[mine].sum()), len(mine), bool(best[mine].all()))

    halving(by_length([len(r.ids) for r in rows], SCORED_TOKENS), run, lambda _: None)
    return [r for r in results if r is not None]


@torch.no_grad()
def perplexity(lm: LM, pieces: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each piece."""
    rows = [Row(tuple(p), 0, 1) for p in pieces]
    head, total = Head(lm), [0.0, 0]

    def run(part: Sequence[int]) -> None:
        padded = batch([rows[i] for i in part], lm.pad_id, lm.device)
        states = hidden_of(lm, padded.targets, lambda: lm.model(**padded.inputs, use_cache=False))
        token = head.cross_entropy(states, padded.labels)
        total[0] += float(token.double().sum())
        total[1] += len(token)

    halving(by_length([len(r.ids) for r in rows], SCORED_TOKENS), run, lambda _: None)
    return float(torch.tensor(total[0] / total[1], dtype=torch.float64).exp())  # infinity, not an overflow error
