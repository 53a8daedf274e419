"""Null-space projectors as an orthonormal basis: ``P = I - U U^T`` or ``P = V V^T``, never a d x d matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editunlearn.numerics.route import CPU, Route


@dataclass(frozen=True)
class Projector:
    """A projector by the smaller of two bases.

    Attributes:
        basis: (d, m) float64, orthonormal columns.
        removes: the basis spans what is removed; else it spans what is left.
    """

    basis: Tensor
    removes: bool = True

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows P`` for ``rows`` (n, d)."""
        inside = (rows @ self.basis) @ self.basis.T
        return rows - inside if self.removes else inside


def null_space(moment: Tensor, threshold: float, *, relative: bool = True, route: Route = CPU) -> Projector:
    """Projector off the directions in which typical keys lie: eigenvectors of ``C`` at or above the threshold.

    Args:
        moment: symmetric (d, d).
        threshold: in units of the mean eigenvalue when ``relative``; else absolute, as published (AlphaEdit: 0.02).

    Raises:
        ValueError: nothing is left to edit in (every direction is protected), or nothing is protected.
    """
    # Float64 on every device: float32 mixes directions whose eigenvalues differ by less than 1e-7 of the largest one,
    # which belongs to the mean activation, and so do hundreds of them around the threshold.
    values, vectors = torch.linalg.eigh(moment.to(route.device, torch.float64))
    limit = threshold * float(values.mean()) if relative else threshold
    protected = int((values >= limit).sum())  # the last ones, as values ascend
    kind = "relative" if relative else "absolute"
    if protected == len(values):
        raise ValueError(
            f"no null space: all {len(values)} eigenvalues are above the {kind} threshold {threshold}; raise it"
        )
    if protected == 0:
        raise ValueError(f"nothing protected: all eigenvalues are below the {kind} threshold {threshold}; lower it")
    removes = protected <= len(values) // 2
    free = len(values) - protected
    return Projector((vectors[:, free:] if removes else vectors[:, :free]).contiguous(), removes)
