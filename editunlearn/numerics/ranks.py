"""Agreement of two rankings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's correlation of two sequences of one length, ties with their mean rank; None where it is undefined.

    It is undefined for fewer than two values and where all values of one side are equal.

    Raises:
        ValueError: lengths differ, or a value is not finite.
    """
    if len(one) != len(other):
        raise ValueError(f"rank_correlation: {len(one)} and {len(other)} values")
    values = np.asarray([one, other], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("rank_correlation: a value is not finite")
    if len(one) < 2 or (values == values[:, :1]).all(1).any():
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(values[0], values[1]).statistic)
