"""What a weight becomes under an update, and the fingerprint of the weight it was made for.

Every way to apply a delta (swapped in, merged in memory, merged on disk) goes through `merged_rows`, so that
they agree bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows that are summed at once: bounds the float32 copies to about 100 MB for the widest layers in use.
ROWS = 2048


@dataclass(frozen=True)
class MergedRows:
    """Rows ``start:stop`` of a weight under an update, each tensor (rows, in)."""

    start: int
    stop: int
    base: Tensor  # the weight, in the summation dtype
    update: Tensor  # dW, in the summation dtype
    merged: Tensor  # base + update, rounded once to the target dtype


def merged_rows(weight: Tensor, left: Tensor, right: Tensor | None, dtype: torch.dtype) -> Iterator[MergedRows]:
    """Streams ``round(weight + left @ right)`` in blocks of rows.

    The sum is taken in float32 (float64 for a float64 weight) and rounded to ``dtype`` once.

    Args:
        weight: (out, in), any floating dtype, any strides.
        left: (out, r) float32.
        right: (r, in) float32; None: ``left`` is (out, in), the whole update.
        dtype: the dtype that the result is stored in.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    left = left.to(weight.device, wide)
    right = right.to(weight.device, wide) if right is not None else None
    for start in range(0, weight.shape[0], ROWS):
        stop = min(start + ROWS, weight.shape[0])
        base = weight[start:stop].to(wide)
        update = left[start:stop] @ right if right is not None else left[start:stop]
        yield MergedRows(start, stop, base, update, (base + update).to(dtype))


@torch.no_grad()
def merged_weight(weight: Tensor, left: Tensor, right: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """``weight + left @ right`` as a new contiguous (out, in) tensor in the weight's dtype and on its device.

    Args:
        weight: (out, in), any floating dtype, any strides.
        left, right: as for :func:`merged_rows`.
        dtype: round to this dtype first, to see what storing the weight in it would do. Default: the weight's
            own.
    """
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for rows in merged_rows(weight, left, right, dtype or weight.dtype):
        result[rows.start : rows.stop] = rows.merged
    return result


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor in C order, copied to the CPU when it is elsewhere."""
    plain = tensor.detach().to("cpu").contiguous()
    data: memoryview = plain.reshape(-1).view(torch.uint8).numpy().data
    return data


@torch.no_grad()
def weight_sha256(weight: Tensor, made_in: str | None = None) -> str:
    """SHA-256 of a weight's values, the same for every dtype that holds these values exactly.

    A bfloat16 checkpoint loaded in float32 holds the same numbers, so floating weights are hashed as float32
    (float64 as they are). Other dtypes (packed quantised weights) are hashed as raw bytes.

    Args:
        weight: (out, in) view of the weight.
        made_in: dtype name that the fingerprint to compare with was taken in ("bfloat16"). A wider weight is
            rounded to it first: rounding is what loading in that dtype did.
    """
    digest = hashlib.sha256()
    digest.update(repr(tuple(weight.shape)).encode())
    if not weight.is_floating_point() or weight.element_size() == 1:
        digest.update(tensor_bytes(weight))
        return digest.hexdigest()
    narrow = getattr(torch, made_in or "", None)
    if not isinstance(narrow, torch.dtype):
        narrow = weight.dtype
    wide = torch.float64 if narrow == torch.float64 == weight.dtype else torch.float32
    for start in range(0, weight.shape[0], ROWS):
        rows = weight[start : start + ROWS]
        if narrow.is_floating_point and narrow.itemsize < weight.dtype.itemsize:
            rows = rows.to(narrow)
        digest.update(tensor_bytes(rows.to(wide)))
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
