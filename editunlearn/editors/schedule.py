"""How many steps refine takes and how large they are: a given number, or more while facts are not learned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LAST_RATE = 0.05
"""Rate of the last step, relative to the first."""


class Schedule:
    """Steps whose rate falls like a cosine; more can be added at the end, which begin at half the rate.

    Stopping as soon as the facts are learned was tried: what stays recovers in the small steps at the end.

    Attributes:
        end: how many steps there are, as far as is known.

    Args:
        planned: steps in any case.
        most: steps at most.
    """

    def __init__(self, planned: int, most: int) -> None:
        self.planned, self.most = planned, most
        self.begin, self.end = 0, planned

    def rate(self, step: int) -> float:
        """Of a step, the first being 0, relative to full steps."""
        way = (step - self.begin) / (self.end - self.begin)
        return _cosine(way if self.begin == 0 else 0.5 + 0.5 * way)

    def may_grow(self, steps: int) -> bool:
        """Whether this number of steps is the last, and more could be added."""
        return steps == self.end < self.most

    def grow(self) -> None:
        """Add a quarter of the planned steps."""
        self.begin, self.end = self.end, min(self.most, self.end + max(1, self.planned // 4))

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"begin": torch.tensor(self.begin), "end": torch.tensor(self.end)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""
        self.begin, self.end = int(state["begin"]), int(state["end"])


def _cosine(way: float) -> float:
    """Rate at a share of the way, 1 at its beginning."""
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * way))
