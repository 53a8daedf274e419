"""How WISE's side memories (https://arxiv.org/abs/2405.14768) are made: margins, merging of shards, thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from editunlearn.numerics.moments import fast_bfloat16
from editunlearn.numerics.side import mean_of_largest

Merge = Literal["ties", "magnitude", "linear"]

SLACK = 0.02
"""What an activation computed in bfloat16 may be short of, relative to itself: several times what was seen."""


@torch.no_grad()
def near(inputs: Tensor, update: Tensor, owner: Tensor, count: int, level: float, most: int | None = None) -> Tensor:
    """Which sequences may have an activation of ``level`` or more, (count,) bool; in bfloat16 where that is fast.

    Only such prompts to keep have a gradient, and once an update has been trained for a few steps they are few.
    """
    if level <= 0:
        return torch.ones(count, dtype=torch.bool, device=inputs.device)
    low = torch.bfloat16 if fast_bfloat16(inputs.device) else torch.float32
    found = torch.linalg.vector_norm(inputs.to(low) @ update.to(low).T, dim=-1, dtype=torch.float32)
    return mean_of_largest(found, owner, count, most) >= (1 - SLACK) * level


def margin(inside: Tensor, outside: Tensor, low: float, high: float, gap: float) -> Tensor:
    """Hinge loss of activations (WISE): of edited prompts above ``high``, of others below ``low``, and ``gap``
    between each two.

    Each term is the mean over those that break its bound: one prompt that is woken matters, however many are not.

    Args:
        inside: (n,) of edited prompts.
        outside: (m,) of prompts to keep; may be empty.
    """
    apart = inside[:, None] - outside
    return _broken(high - inside) + _broken(outside - low) + _broken(gap - apart)


def _broken(bounds: Tensor) -> Tensor:
    """Mean of the positive numbers; 0 where there are none."""
    return bounds.clamp(min=0).sum() / (bounds > 0).sum().clamp(min=1)


def threshold(inside: Tensor, outside: Tensor, ratio: float, clear: float | None) -> float:
    """Least activation that wakes a memory: ``ratio`` of the least of an edited prompt.

    Args:
        inside: (n,) of edited prompts. outside: (m,) of prompts to keep.
        clear: nor is it below this share of the way from the largest of a prompt to keep up to the former.
    """
    least = float(inside.min())
    if clear is None or len(outside) == 0:
        return ratio * least
    most = float(outside.max())
    return max(ratio * least, most + clear * (least - most))


def merged(updates: Sequence[Tensor], how: Merge, density: float) -> Tensor:
    """One update of several of the same shape.

    ``linear``: their mean. ``magnitude``: of each only the largest entries, and the mean of those that there are.
    ``ties`` (https://arxiv.org/abs/2306.01708): likewise, but only of entries with the sign of their sum.

    Args:
        density: share of an update's entries that are kept.
    """
    if len(updates) == 1:
        return updates[0]
    if how == "linear":
        return torch.stack(list(updates)).mean(0)
    kept = torch.stack([_largest(update, density) for update in updates])
    there = kept != 0
    if how == "ties":
        there &= kept.sign() == kept.sum(0).sign()
    return (kept * there).sum(0) / there.sum(0).clamp(min=1)


def _largest(update: Tensor, density: float) -> Tensor:
    """``update`` with all but its largest entries set to zero; equal ones are kept or dropped together."""
    count = round(density * update.numel())
    if count >= update.numel():
        return update
    if count == 0:
        return torch.zeros_like(update)
    least = update.abs().flatten().kthvalue(update.numel() - count + 1).values
    return torch.where(update.abs() >= least, update, 0.0)
