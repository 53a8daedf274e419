"""Null-space projectors as the basis of what is removed: ``P = I - U U^T``, never a d x d matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def project(rows: Tensor, removed: Tensor) -> Tensor:
    """``rows P`` for ``rows`` (n, d) and an orthonormal ``removed`` (d, m)."""
    return rows - (rows @ removed) @ removed.T


def protected_basis(moment: Tensor, threshold: float, *, relative: bool = True) -> Tensor:
    """Directions in which typical keys lie: eigenvectors of ``C`` with an eigenvalue of at least the threshold.

    Args:
        moment: symmetric (d, d).
        threshold: in units of the mean eigenvalue when ``relative``; else absolute, as published (AlphaEdit: 0.02).

    Returns:
        (d, m) float64, orthonormal columns.

    Raises:
        ValueError: nothing is left to edit in (every direction is protected), or nothing is protected.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    limit = threshold * float(values.mean()) if relative else threshold
    removed: Tensor = vectors[:, values >= limit]
    kind = "relative" if relative else "absolute"
    if removed.shape[1] == len(values):
        raise ValueError(
            f"no null space: all {len(values)} eigenvalues are above the {kind} threshold {threshold}; raise it"
        )
    if removed.shape[1] == 0:
        raise ValueError(f"nothing protected: all eigenvalues are below the {kind} threshold {threshold}; lower it")
    return removed
