"""How long refine goes on and how large its steps are: a given number of steps, or more until facts are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

LAST_RATE = 0.05
"""Rate of the last step, relative to the first."""

LEARNED = 5.0
"""A fact is learned when its loss (mean over tokens plus the largest) is at most this times the floor."""

SHARE = 0.95
"""Share of the facts that must be learned at the end; one that never is must not hold up the rest."""


def _cosine(way: float) -> float:
    """Rate at a share of the way, 1 at its beginning."""
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * way))


class Schedule(Protocol):
    """Rates of the steps, one after the other."""

    @property
    def end(self) -> int:
        """How many steps there will be, as far as is known."""

    def rate(self, step: int) -> float:
        """Of a step, the first being 0, relative to full steps."""

    def saw(self, step: int, facts: Sequence[int], loss: Tensor) -> None:
        """A step found this loss for these facts."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""


class Given:
    """A given number of steps, the rate falling like a cosine."""

    def __init__(self, steps: int) -> None:
        self.end = steps

    def rate(self, step: int) -> float:
        """See :class:`Schedule`."""
        return _cosine(step / self.end)

    def saw(self, step: int, facts: Sequence[int], loss: Tensor) -> None:
        """Does not matter here."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


class UntilLearned:
    """A planned number of steps like :class:`Given`; while too few facts are learned at the end, half as many again.

    The steps that are added begin at half the rate. Stopping as soon as the facts are learned was tried: what stays
    recovers in the small steps at the end.

    Args:
        facts: how many there are.
        floor: loss below which a fact does not count any more.
        planned: steps in any case.
        most: steps at most.
    """

    def __init__(self, facts: int, floor: float, planned: int, most: int) -> None:
        self.enough, self.planned, self.most = LEARNED * max(floor, 0.1), planned, most
        self.latest = torch.full((facts,), torch.inf)
        self.begin, self.end = 0, planned

    def rate(self, step: int) -> float:
        """See :class:`Schedule`."""
        way = (step - self.begin) / (self.end - self.begin)
        return _cosine(way if self.begin == 0 else 0.5 + 0.5 * way)

    def saw(self, step: int, facts: Sequence[int], loss: Tensor) -> None:
        """See :class:`Schedule`."""
        self.latest[list(facts)] = loss.detach().cpu().float()
        learned = int((self.latest <= self.enough).sum())
        if step == self.end - 1 < self.most - 1 and learned < math.ceil(SHARE * len(self.latest)):
            self.begin, self.end = self.end, min(self.most, self.end + max(1, self.planned // 2))

    def state(self) -> dict[str, Tensor]:
        """See :class:`Schedule`."""
        return {"latest": self.latest, "begin": torch.tensor(self.begin), "end": torch.tensor(self.end)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See :class:`Schedule`."""
        self.latest = state["latest"].clone()
        self.begin, self.end = int(state["begin"]), int(state["end"])
