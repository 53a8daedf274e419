"""How long refine goes on and how large its steps are: a given number of steps, or until the facts are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

LAST_RATE = 0.05
"""Rate of the last step, relative to the first."""

LEARNED = 2.0
"""A fact is learned when its loss is at most this times the floor."""

SHARE = 0.95
"""Share of the facts that must be learned before the steps get smaller; one that never is must not hold up the rest."""

FULL = 0.8
"""Rate until they are learned."""

LEAST_TAIL = 15
"""Fewest steps of the tail, which else has as many as were needed to learn. What stays recovers in it: with a third as
many, 40 facts were forgotten as well, but half as much again of the others was lost."""


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
    """Large steps until nearly all facts are learned, then as many that get smaller like the second half of a cosine.

    Args:
        facts: how many there are.
        floor: loss below which a fact does not count any more.
        most: steps at most, tail included.
    """

    def __init__(self, facts: int, floor: float, most: int) -> None:
        self.enough, self.most = LEARNED * max(floor, 0.1), most
        self.latest = torch.full((facts,), torch.inf)
        self.turn = max(0, min(most // 2, most - LEAST_TAIL))
        self.turned = False

    @property
    def end(self) -> int:
        """See :class:`Schedule`."""
        return min(self.most, self.turn + max(LEAST_TAIL, self.turn))

    def rate(self, step: int) -> float:
        """See :class:`Schedule`."""
        return FULL if step < self.turn else _cosine(0.5 + 0.5 * (step - self.turn) / (self.end - self.turn))

    def saw(self, step: int, facts: Sequence[int], loss: Tensor) -> None:
        """See :class:`Schedule`."""
        self.latest[list(facts)] = loss.detach().cpu().float()
        learned = int((self.latest <= self.enough).sum())
        if step < self.turn and not self.turned and learned >= math.ceil(SHARE * len(self.latest)):
            self.turn, self.turned = step + 1, True

    def state(self) -> dict[str, Tensor]:
        """See :class:`Schedule`."""
        return {"latest": self.latest, "turn": torch.tensor(self.turn), "turned": torch.tensor(self.turned)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See :class:`Schedule`."""
        self.latest = state["latest"].clone()
        self.turn, self.turned = int(state["turn"]), bool(state["turned"])
