"""Losses over large vocabularies that never hold more than a few rows of float32 probabilities.

The usual float32 softmax and its backward pass make five float32 copies of the logits. Here the loss and its gradient
are computed together, a few rows at a time; the gradient is kept in the logits' own dtype, or takes their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROW_ELEMENTS = 1 << 18
"""Elements of one float32 piece (1 MB), small enough to stay in a processor's cache between two operations."""

GPU_ROW_ELEMENTS = 1 << 26
"""The same on a GPU, where few large operations are better than many small ones."""

FLOOR = -60.0
"""Logits further than this below the largest of their row count as this (e^-60 is 1e-26). Smaller probabilities turn
into denormal numbers, on which a processor is many times slower."""


def _pieces(logits: Tensor) -> list[slice]:
    """Rows of one piece after the other."""
    rows = max(1, (GPU_ROW_ELEMENTS if logits.is_cuda else ROW_ELEMENTS) // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _shifted(logits: Tensor) -> Tensor:
    """A float32 copy of which the largest of each row is 0."""
    wide = logits.to(torch.float32, copy=True)
    return wide.sub_(wide.amax(-1, keepdim=True)).clamp_(min=FLOOR)


def cross_entropy_and_gradient(logits: Tensor, labels: Tensor, out: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each row, (n,) float32.

    Its gradient with respect to ``logits`` (n, vocabulary) goes to ``out``, which may be ``logits`` itself.
    """
    loss = torch.empty(len(labels), device=logits.device)
    for part in _pieces(logits):
        wide = _shifted(logits[part])
        own = wide.gather(1, labels[part, None])
        total = wide.exp_().sum(-1, keepdim=True)
        loss[part] = (total.log() - own)[:, 0]
        if out is not None:
            out[part] = wide.div_(total).scatter_add_(1, labels[part, None], -torch.ones_like(own))
    return loss


def kl_and_gradient(base: Tensor, edited: Tensor, out: Tensor | None = None) -> Tensor:
    """KL(base || edited) of each row, (n,) float32.

    Its gradient with respect to ``edited`` (n, vocabulary) goes to ``out``, which may be ``edited`` itself.
    """
    loss = torch.empty(len(base), device=base.device)
    for part in _pieces(base):
        p, q = _shifted(base[part]), _shifted(edited[part])
        apart = p - q
        p_total, q_total = p.exp_().sum(-1), q.exp_().sum(-1)
        p.div_(p_total[:, None])
        loss[part] = apart.mul_(p).sum(-1) + q_total.log() - p_total.log()
        if out is not None:
            out[part] = q.div_(q_total[:, None]).sub_(p)
    return loss


def surprise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the log-probability under each row's own distribution, both (n,) float32."""
    mean, deviation = torch.empty(2, len(logits), device=logits.device)
    for part in _pieces(logits):
        log_p = _shifted(logits[part]).log_softmax(-1)
        p = log_p.exp()
        mean[part] = (p * log_p).sum(-1)
        deviation[part] = (p * (log_p - mean[part, None]).square()).sum(-1).sqrt()
    return mean, deviation


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        return cross_entropy_and_gradient(logits, labels, ctx.grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.grad * upstream[:, None].to(ctx.grad.dtype), None


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, edited: Tensor) -> Tensor:
        ctx.grad = torch.empty_like(edited) if ctx.needs_input_grad[1] else None
        return kl_and_gradient(base, edited, ctx.grad)

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
