"""Wrong answers to train on: random tokens, or the unedited model's second choice."""

from __future__ import annotations

import torch
from torch import Tensor


def likeliest_others(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest token other than the true one at each position, (n,) int64.

    Args:
        logits: (n, vocabulary), each at the position that predicts its label. labels: (n,).
    """
    return logits.scatter(-1, labels[:, None], -torch.inf).argmax(-1)


def random_tokens(labels: Tensor, allowed: Tensor, seed: int) -> Tensor:
    """A token of ``allowed`` (m,) for each label, uniform, never the true one, (n,) int64."""
    draw = torch.Generator().manual_seed(seed)
    allowed = allowed.cpu().sort().values
    true = torch.searchsorted(allowed, labels.cpu())
    inside = (true < len(allowed)) & (allowed[true.clamp(max=len(allowed) - 1)] == labels.cpu())
    picked = (torch.rand(labels.shape, generator=draw, dtype=torch.float64) * (len(allowed) - inside.long())).long()
    # among all but the true one: those behind it move up by one
    return allowed[picked + (inside & (picked >= true)).long()].to(labels.device)
