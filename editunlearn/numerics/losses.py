"""Losses over large vocabularies that never hold more than a few rows of float32 probabilities.

Logits of 500 positions of a 262,144-word vocabulary are 0.25 GB in bfloat16; the usual float32 softmax and its backward
pass make five copies of twice that size. Here the loss and its gradient are computed together, a few rows at a time;
the gradient is kept in the logits' own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROW_ELEMENTS = 1 << 22
"""Elements of one float32 piece (16 MB), small enough to stay in a processor's cache."""


FLOOR = -60.0
"""Log-probabilities below this count as this (e^-60 is 1e-26). Smaller ones turn into denormal numbers, on which a
processor is many times slower."""


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).clamp_(min=FLOOR)


def _rows(logits: Tensor) -> int:
    return max(1, ROW_ELEMENTS // logits.shape[-1])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        loss = torch.empty(len(labels), device=logits.device)
        keep = ctx.needs_input_grad[0]
        grad = torch.empty_like(logits) if keep else None
        for start in range(0, len(labels), _rows(logits)):
            part = slice(start, start + _rows(logits))
            log_p = _log_softmax(logits[part])
            loss[part] = -log_p.gather(1, labels[part, None])[:, 0]
            if grad is not None:
                wide = log_p.exp_()
                wide[torch.arange(len(wide), device=wide.device), labels[part]] -= 1
                grad[part] = wide.to(grad.dtype)
        ctx.grad = grad
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.grad * upstream[:, None].to(ctx.grad.dtype), None


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, edited: Tensor) -> Tensor:
        loss = torch.empty(len(base), device=base.device)
        grad = torch.empty_like(edited) if ctx.needs_input_grad[1] else None
        for start in range(0, len(base), _rows(base)):
            part = slice(start, start + _rows(base))
            p, q = _log_softmax(base[part]), _log_softmax(edited[part])
            weight = p.exp()
            loss[part] = (weight * (p - q)).sum(-1)
            if grad is not None:
                grad[part] = (q.exp_() - weight).to(grad.dtype)
        ctx.grad = grad
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        return None, ctx.grad * upstream[:, None].to(ctx.grad.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood in nats of ``labels`` (n,) under ``logits`` (n, vocabulary), (n,) float32."""
    return _CrossEntropy.apply(logits, labels)  # type: ignore[no-any-return,no-untyped-call]


def kl(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base || edited) in nats of each row of logits (n, vocabulary), (n,) float32; ``base`` gets no gradient."""
    return _KL.apply(base.detach(), edited)  # type: ignore[no-any-return,no-untyped-call]


def mean_by(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean of ``values`` (n,) within each group number, (count,), 0 for a group of none; differentiable."""
    total = torch.zeros(count, device=values.device, dtype=values.dtype).index_add(0, groups, values)
    size = torch.zeros(count, device=values.device, dtype=values.dtype).index_add(0, groups, torch.ones_like(values))
    return total / size.clamp(min=1)


def largest_by(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Largest of ``values`` (n,) within each group number, (count,), 0 for a group of none; differentiable."""
    start = torch.zeros(count, device=values.device, dtype=values.dtype)
    return start.scatter_reduce(0, groups, values, "amax", include_self=False)
