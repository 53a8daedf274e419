"""Streaming uncentred second moments ``C = E[k k^T]`` of layer inputs ("covariance" in the ROME and MEMIT papers)."""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoment:
    """Running sum of outer products of rows.

    Products of one chunk are formed in float32 (or float64 for float64 input); chunks are added up in float64, so that
    the error does not grow with the number of tokens.

    Attributes:
        total: (d, d) float64, the sum of ``k k^T``.
        count: number of rows added.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add ``rows`` (n, d), any floating dtype."""
        wide = rows if rows.dtype == torch.float64 else rows.float()
        self.total = self.total.to(rows.device)  # what an interrupted run left comes from the disk
        self.total += wide.T @ wide
        self.count += rows.shape[0]

    def mean(self) -> Tensor:
        """``C`` (d, d) float64, symmetric.

        Raises:
            ValueError: nothing was added.
        """
        if self.count == 0:
            raise ValueError("a second moment of no rows")
        return (self.total + self.total.T) / (2 * self.count)
