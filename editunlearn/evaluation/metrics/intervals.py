"""Confidence intervals: a number without one says little about forty facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean over items with its confidence interval.

    Attributes:
        value: the mean.
        low, high: bounds of the interval.
        items: how many.
    """

    value: float
    low: float
    high: float
    items: int


def estimate(values: Sequence[float], *, level: float = 0.95, seed: int = 0, share: bool = True) -> Estimate | None:
    """Mean of items with a confidence interval; None when there are none.

    For rates (all values 0 or 1) Wilson's interval: resampling would give a rate of 0 of 40 the interval [0, 0]. For
    other values the percentile bootstrap over items.

    Args:
        share: values of 0 and 1 are hits and misses, not amounts that happen to be so.

    Raises:
        ValueError: a value is not finite.
    """
    from scipy import stats

    items = np.asarray(values, dtype=np.float64)
    if not len(items):
        return None
    if not np.isfinite(items).all():
        raise ValueError("estimate: a value is not finite")
    mean = float(items.mean())
    if share and np.isin(items, (0.0, 1.0)).all():
        found = stats.binomtest(int(items.sum()), len(items)).proportion_ci(level, method="wilson")
        return Estimate(mean, float(found.low), float(found.high), len(items))
    if len(items) == 1:
        return Estimate(mean, float("-inf"), float("inf"), 1)
    draw = np.random.default_rng(seed)
    means = items[draw.integers(0, len(items), (RESAMPLES, len(items)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), len(items))


def mean_of_means(groups: Sequence[Sequence[float]]) -> Estimate | None:
    """Mean of the means of groups, however many items each has; None when there are none.

    The interval is put together from the groups' own (Zou and Donner 2008, Statistics in Medicine 27:1693): the squares
    of their distances from the means add up, each side for itself, so that it is right for rates near 0 and 1 as well.

    Raises:
        ValueError: a value is not finite.
    """
    each = [found for group in groups if (found := estimate(group)) is not None]
    if not each:
        return None
    value = sum(found.value for found in each) / len(each)
    below, above = (
        math.sqrt(sum((found.value - bound) ** 2 for found, bound in zip(each, bounds, strict=True))) / len(each)
        for bounds in ([found.low for found in each], [found.high for found in each])
    )
    return Estimate(value, value - below, value + above, sum(found.items for found in each))
