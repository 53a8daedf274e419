"""Where to train: scores of weights, rows or whole matrices from gradients, and a random choice of equal size.

All of it is measured on the model as it came, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Masks = dict[str, Tensor]
"""By the name of a value, bool, broadcast to it: what is trained."""


def gradient_ratio(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], epsilon: float) -> dict[str, Tensor]:
    """GRIN (arXiv 2508.06467): |g_forget| / (|g_retain| + epsilon u) of each weight.

    u is the mean |g_retain| over all weights, so that epsilon does not depend on the size of the gradients.
    """
    total = sum(float(g.double().abs().sum()) for g in retain.values())
    unit = total / sum(g.numel() for g in retain.values())
    return {name: forget[name].abs() / (retain[name].abs() + epsilon * unit) for name in forget}


def largest(scores: Mapping[str, Tensor], share: float) -> Masks:
    """The entries with the largest scores, ``share`` of all entries together, at least one."""
    here = next(iter(scores.values())).device  # a model may be spread over several
    flat = torch.cat([score.flatten().to(here) for score in scores.values()])
    count = max(1, round(share * flat.numel()))
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(count, sorted=False).indices] = True
    return _divided(chosen, scores)


def row_norms(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norm of each row's gradient, (out, 1)."""
    return {name: gradient.norm(dim=1, keepdim=True) for name, gradient in gradients.items()}


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two matrices taken as vectors, in float64; 0 where one of them is zero."""
    a, b = one.double().flatten(), other.double().flatten()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0


def region(
    forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], most_alike: float, least: float, *, relative: bool
) -> Masks:
    """MemFlex (arXiv 2407.01920): whole matrices whose gradients point elsewhere than what is to stay, and matter.

    Args:
        most_alike: the cosine of both gradients is below this.
        least: the mean |g_forget| is above this; ``relative``: times its median over all matrices.
    """
    sizes = {name: float(g.abs().mean()) for name, g in forget.items()}
    unit = float(torch.tensor(list(sizes.values()), dtype=torch.float64).median()) if relative else 1.0
    return {
        name: torch.tensor(cosine(g, retain[name]) < most_alike and sizes[name] > least * unit, device=g.device)
        for name, g in forget.items()
    }


def at_random(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """As many entries of the masks, rows or whole matrices, drawn from all of them: the control of a localisation."""
    flat = torch.cat([mask.flatten().cpu() for mask in masks.values()])
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[torch.randperm(flat.numel(), generator=draw)[: int(flat.sum())]] = True
    return _divided(chosen, masks)


def _divided(flat: Tensor, like: Mapping[str, Tensor]) -> Masks:
    pieces = torch.split(flat, [score.numel() for score in like.values()])
    pairs = zip(like.items(), pieces, strict=True)
    return {name: piece.reshape(score.shape).to(score.device) for (name, score), piece in pairs}


def chosen(masks: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Entries of values of these shapes that the masks let be trained."""
    return sum(int(mask.expand(shapes[name]).sum()) for name, mask in masks.items())
