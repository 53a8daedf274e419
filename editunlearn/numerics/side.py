"""WISE's side memory (https://arxiv.org/abs/2405.14768) as it is read: activation, and who goes through it.

A side memory is an update ``U`` (d_out, d_in) of one linear map: its output for an input x is ``W x + U x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editunlearn.numerics.losses import mean_by


def latest(mask: Tensor, window: int | None) -> Tensor:
    """Of each row's tokens the last ``window``; None: all of them.

    Args:
        mask: (rows, length) bool, which tokens it has.
    """
    return mask if window is None else mask & (mask.flip(1).cumsum(1).flip(1) <= window)


def activation(inputs: Tensor, update: Tensor, owner: Tensor, count: int, most: int | None = None) -> Tensor:
    """How much an update does to each sequence (routing activation), (count,): mean over its tokens of ``norm(U x)``.

    Args:
        inputs: (tokens, d_in), the tokens that count, of all sequences.
        update: (d_out, d_in).
        owner: (tokens,) number of the sequence that each belongs to.
        count: sequences.
        most: so many tokens of each, those that the update does most to; None, as in the paper: the mean over all.
    """
    norms = torch.linalg.vector_norm(inputs @ update.T, dim=-1)  # its gradient at zero is zero
    return mean_of_largest(norms, owner, count, most)


def mean_of_largest(values: Tensor, owner: Tensor, count: int, most: int | None) -> Tensor:
    """Mean of the ``most`` largest values of each sequence, (count,); 0 of one that has none.

    Args:
        values: (tokens,) of all sequences.
        owner, count, most: as for :func:`activation`.
    """
    if most is not None:
        order = values.detach().argsort(descending=True)
        order = order[owner[order].argsort(stable=True)]  # sequence after sequence, in each the largest first
        each = owner.bincount(minlength=count)
        rank = torch.arange(len(order), device=order.device) - (each.cumsum(0) - each)[owner[order]]
        kept = order[rank < most]
        values, owner = values[kept], owner[kept]
    return mean_by(values, owner, count)


def route(activations: Tensor, thresholds: Tensor) -> Tensor:
    """For each sequence the most active memory of those above their thresholds, -1 where there is none, (rows,).

    Args:
        activations: (rows, memories).
        thresholds: (memories,).
    """
    if activations.shape[1] == 0:
        return torch.full((len(activations),), -1, device=activations.device)
    awake = torch.where(activations >= thresholds, activations, -1.0)
    best, index = awake.max(1)
    return torch.where(best >= 0, index, -1)


def middles(inputs: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean input of each sequence, (count, d_in); arguments as for :func:`activation`."""
    total = torch.zeros(count, inputs.shape[1], dtype=inputs.dtype, device=inputs.device).index_add(0, owner, inputs)
    return total / owner.bincount(minlength=count).clamp(min=1)[:, None]


def spared(middle: Tensor, marks: Tensor, owners: Tensor) -> Tensor:
    """Which sequences are nearest to a fact that was taken out, (rows,) bool.

    A memory is one matrix for many facts, and nothing of it is one fact's own. So a fact is taken out by leaving the
    memory unread where, of all facts, it is the nearest.

    Args:
        middle: (rows, d_in) mean inputs of the sequences.
        marks: (m, d_in) mean inputs of the facts' prompts.
        owners: (m,) number of each fact's memory, negative once it was taken out.
    """
    if not bool((owners < 0).any()):
        return torch.zeros(len(middle), dtype=torch.bool, device=middle.device)
    far = torch.cdist(middle, marks, compute_mode="donot_use_mm_for_euclid_dist")
    held = torch.where(owners < 0, torch.inf, far)  # a fact that was taken out and forgotten anew has two marks
    return far.min(1).values < held.min(1).values
