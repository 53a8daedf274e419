"""Streaming uncentred second moments ``C = E[k k^T]`` of layer inputs ("covariance" in the ROME and MEMIT papers)."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2048
"""Rows of one product. In bfloat16 on a CPU each product is rounded once; rounding of many averages out."""

BLOCK = 256
"""Width of the blocks that the lower triangle is made of; the upper one is never computed."""

BLOCKS = 8
"""Most blocks in one direction: 9/16 of the whole product, and more would make each too small to be fast."""


class SecondMoment:
    """Running sum of outer products of rows.

    Products are formed in the rows' own precision when that is bfloat16 and the device is fast at it, otherwise in
    float32 (float64 for float64 rows), always with float32 accumulation inside a product or better. Products are added
    up in float64, so that the error does not grow with the number of rows.

    Attributes:
        total: (d, d) float64, the sum of ``k k^T``; only its lower triangle counts.
        count: number of rows added.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add ``rows`` (n, d), any floating dtype."""
        self.total = self.total.to(rows.device)  # what an interrupted run left comes from the disk
        if rows.dtype != torch.float64 and not (rows.dtype == torch.bfloat16 and fast_bfloat16(rows.device)):
            rows = rows.float()
        width = len(self.total)
        size = max(BLOCK, -(-width // BLOCKS))
        for part in torch.split(rows, ROWS):
            for start in range(0, width, size):
                end = min(start + size, width)
                left, right = part.narrow(1, start, end - start), part.narrow(1, 0, end)
                self.total.narrow(0, start, end - start).narrow(1, 0, end).add_(_product(left, right))
        self.count += rows.shape[0]

    def mean(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``C`` (d, d), symmetric; beside the sum and itself it takes the memory of a few rows.

        Raises:
            ValueError: nothing was added.
        """
        if self.count == 0:
            raise ValueError("a second moment of no rows")
        whole = torch.zeros_like(self.total, dtype=dtype)
        for start in range(0, len(whole), BLOCK):
            size = min(BLOCK, len(whole) - start)
            end = start + size
            rows = (self.total.narrow(0, start, size).narrow(1, 0, end) / self.count).to(dtype).tril(start)
            whole.narrow(0, start, size).narrow(1, 0, end).add_(rows)
            whole.narrow(1, start, size).narrow(0, 0, end).add_(rows.tril(start - 1).T)
        return whole


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right``, in float32 where the device can give that for bfloat16."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T @ right


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones; on processors without the instructions they are not."""
    if device.type != "cpu":
        return True
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
