"""What a block is trained on that is to give other outputs at some tokens and its old ones at all others."""

from __future__ import annotations

from torch import Tensor


def mismatch(now: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Sum over tokens of the weighted mean squared difference.

    Args:
        now, wanted: (tokens, width). weight: (tokens,).
    """
    return (weight * (now - wanted).square().mean(-1)).sum()
