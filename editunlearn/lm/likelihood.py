"""How likely a model finds given continuations, and whether it would write them itself (teacher-forced)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.head import Head, hidden_of
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Row, batch
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


@dataclass(frozen=True)
class TokenScores:
    """What a model finds of each target token of one row, the ones before it given.

    Attributes:
        log_p: natural logarithm of its probability.
        predicted, gold: the likeliest token there, and the row's own.
        mean, deviation: of the log-probability under the model's own distribution there; empty unless asked for.
    """

    log_p: tuple[float, ...]
    predicted: tuple[int, ...]
    gold: tuple[int, ...]
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return -sum(self.log_p) / len(self.log_p)

    def without_last(self) -> TokenScores:
        """Without the closing token."""
        return TokenScores(*(part[:-1] for part in astuple(self)))


@torch.no_grad()
def states_of(lm: LM, rows: Sequence[Row], done: Callable[[int], None] = lambda _: None) -> list[Tensor]:
    """States before the head that predict the target tokens, for each row (its target tokens, width)."""
    results: list[Tensor] = [torch.empty(0)] * len(rows)

    def run(part: Sequence[int]) -> None:
        padded = batch([rows[i] for i in part], lm.pad_id, lm.device)
        states = hidden_of(lm, padded.targets, lambda: forward(lm.model, padded))
        sizes = padded.owners.bincount(minlength=len(part)).tolist()
        for i, own in zip(part, torch.split(states, sizes), strict=True):
            results[i] = own
        done(len(part))

    halving(by_length([len(r.ids) for r in rows], SCORED_TOKENS), run, lambda _: None)
    return results


@torch.no_grad()
def token_scores(
    lm: LM, rows: Sequence[Row], *, spread: bool = False, done: Callable[[int], None] = lambda _: None
) -> list[TokenScores]:
    """Each target token of each row, teacher-forced.

    Args:
        spread: find ``mean`` and ``deviation`` too.
        done: called with the number of rows of every batch.
    """
    results: list[TokenScores | None] = [None] * len(rows)
    head = Head(lm)

    def run(part: Sequence[int]) -> None:
        padded = batch([rows[i] for i in part], lm.pad_id, lm.device)
        states = hidden_of(lm, padded.targets, lambda: forward(lm.model, padded))
        pieces = []
        for logits, labels in zip(head.logits(states), padded.labels.split(head.rows), strict=True):  # type: ignore[no-untyped-call]
            found = [-losses.cross_entropy_and_gradient(logits, labels), logits.argmax(-1), labels]
            pieces.append(found + list(losses.surprise(logits) if spread else ()))
        columns = [torch.cat(column).tolist() for column in zip(*pieces, strict=True)]
        ends = padded.owners.bincount(minlength=len(part)).cumsum(0).tolist()
        for i, start, end in zip(part, [0, *ends], ends, strict=False):
            results[i] = TokenScores(*(tuple(column[start:end]) for column in columns))
        done(len(part))

    halving(by_length([len(r.ids) for r in rows], SCORED_TOKENS), run, lambda _: None)
    return [r for r in results if r is not None]


def score(lm: LM, rows: Sequence[Row], *, closed: bool = True) -> list[Likelihood]:
    """Likelihood of the target part of each row.

    Args:
        closed: the rows end with a closing token, which is left out of the score.
    """
    found = [t.without_last() if closed else t for t in token_scores(lm, rows)]
    return [Likelihood(sum(t.log_p), len(t.log_p), t.predicted == t.gold) for t in found]


@torch.no_grad()
def perplexity(lm: LM, pieces: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each piece.

    Text is read, not answered: where it matters to an edit, all of a piece is prompt.
    """
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
