"""Linear regression."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def ridge(x: Tensor, y: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """The affine map ``f`` with the least ``|f(x) - y|^2 + strength * n * mean variance of x * |weights|^2``.

    The intercept is not penalised.

    Args:
        x: (n, d). y: (n, e).

    Returns:
        maps (m, d) to (m, e).
    """
    centre, middle = x.mean(0), y.mean(0)
    inputs, outputs = (x - centre).double(), (y - middle).double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(strength * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, inputs.T @ outputs).to(x.dtype)
    return lambda new: (new - centre) @ weights + middle
