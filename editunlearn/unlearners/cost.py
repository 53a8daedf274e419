"""What a training takes, from its settings and the shapes of what it trains alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editunlearn.hparams import Keeping, UnlearnerHParams

ROW = 16
"""Tokens of a fact to keep with its answer, about."""


def numbers(hp: UnlearnerHParams, shapes: Sequence[tuple[int, int]]) -> int:
    """Numbers that are trained, of matrices (out, in)."""
    if hp.train.what == "lora":
        return sum(hp.train.rank * (out + width) for out, width in shapes)
    return sum(out * width for out, width in shapes)


def nbytes(hp: UnlearnerHParams, shapes: Sequence[tuple[int, int]], stored: int) -> int:
    """Bytes while they are trained: change, gradient, two moments and the last good state in float32, and, of whole
    matrices, the weights that the model computes with.

    Args:
        stored: bytes of a number in the model's dtype.
    """
    return numbers(hp, shapes) * (5 * 4 + (0 if hp.train.what == "lora" else stored))


def flops(
    hp: UnlearnerHParams, facts: int, forget_tokens: float, scored: float, cost: Callable[[float, float], float]
) -> float:
    """Floating-point operations of all epochs, at most: forward, back through the states, and to the weights.

    Args:
        forget_tokens: of all facts with their answers; ``scored``: of the answers.
        cost: of a forward pass over some tokens, some of which the head sees.
    """
    retain: Keeping | None = getattr(hp, "retain", None)
    total = cost(forget_tokens, scored)
    if retain is not None:
        rows = facts * retain.ratio
        length = retain.text_length if retain.data == "text" else ROW
        total += cost(rows * length, rows * (length if retain.loss == "kl" or retain.data == "text" else 2))
    return 3 * hp.train.epochs * total
