"""Ridge regression against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge

from editunlearn.numerics.regression import ridge


@pytest.mark.parametrize("rows", [40, 5])
def test_it_is_scikit_learns(rows: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(rows, width, generator=draw, dtype=torch.float64) + 3 for width in (8, 3))
    new = torch.randn(4, 8, generator=draw, dtype=torch.float64)
    variance = ((x - x.mean(0)) ** 2).sum(0).mean()
    expected = Ridge(alpha=float(0.3 * variance)).fit(x.numpy(), y.numpy()).predict(new.numpy())
    torch.testing.assert_close(ridge(x, y, 0.3)(new), torch.from_numpy(expected))
