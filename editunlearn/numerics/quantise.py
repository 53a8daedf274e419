"""Rounding of weights to few bits and back ("fake quantisation"), in plain torch on any device.

What a deployed low-bit model computes with, but stored wide. Round-to-nearest, no calibration data.
"""

from __future__ import annotations

import torch
from torch import Tensor

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Levels of the 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal distribution."""


def round_to_nearest(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Symmetric integers of ``bits`` bits with one scale for each row, or for each ``group`` of a row.

    Args:
        weight: (out, in), any floating dtype.
        bits: 2 to 8; the levels are ``-(2^(bits-1) - 1) .. 2^(bits-1) - 1``.
        group: divides ``in``; None: the whole row (as LLM.int8 does for 8 bits).

    Returns:
        The nearest representable weight, same shape and dtype.

    Raises:
        ValueError: bits out of range, or a group that does not divide the row.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"round_to_nearest: {bits} bits; 2 to 8 are possible")
    grouped = _grouped(weight, group or weight.shape[1])
    levels = 2 ** (bits - 1) - 1
    scale = _largest(grouped) / levels
    found: Tensor = (grouped / scale).round() * scale
    return found.reshape(weight.shape).to(weight.dtype)


def nf4(weight: Tensor, group: int = 64) -> Tensor:
    """4-bit NormalFloat with one scale (the largest absolute value) for each ``group`` of ``in``.

    Groups lie within rows; bitsandbytes counts them through the flattened tensor, which is the same when ``group``
    divides ``in``.

    Raises:
        ValueError: a group that does not divide the row.
    """
    grouped = _grouped(weight, group)
    scale = _largest(grouped)
    levels = torch.tensor(NF4, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    found: Tensor = levels[torch.bucketize((grouped / scale).contiguous(), between)] * scale
    return found.reshape(weight.shape).to(weight.dtype)


def _grouped(weight: Tensor, group: int) -> Tensor:
    if weight.shape[1] % group:
        raise ValueError(f"a group of {group} does not divide rows of {weight.shape[1]}")
    return weight.float().reshape(weight.shape[0], -1, group)


def _largest(grouped: Tensor) -> Tensor:
    """Largest absolute value of each group, 1 for a group of zeros."""
    found = grouped.abs().amax(-1, keepdim=True)
    return torch.where(found == 0, 1.0, found)
