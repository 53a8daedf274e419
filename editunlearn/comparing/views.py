"""Numbers made of the results of runs: the score that selects, matched forgetting, the front, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editunlearn.evaluation.results import Value

FORGET = ("forget.leak", "distracted.leak", "paraphrases.leak", "questions.leak")
"""Rates whose mean is the leak of a run: the facts in their own words, behind a sentence, in others, as questions."""
KEEP = ("neighbors.correct", "heldout.correct")
"""Rates whose mean is what a run kept: facts that no method was shown."""
KEEP_ELSE = "retain.correct"
"""What is looked at where there are none of those."""


@dataclass(frozen=True)
class Point:
    """One run as the views see it.

    Attributes:
        arm, trial, seed: which run.
        leak: mean rate of true answers in the decoded text of facts to forget, in [0, 1].
        kept: mean rate of right answers to what must stay, in [0, 1].
        perplexity: of held-out text.
    """

    arm: str
    trial: int
    seed: int
    leak: float
    kept: float
    perplexity: float

    @property
    def score(self) -> float:
        """Harmonic mean of what is forgotten and what is kept: high only if both are."""
        forgotten = 1 - self.leak
        return 2 * forgotten * self.kept / (forgotten + self.kept) if forgotten + self.kept else 0.0


def point(arm: str, trial: int, seed: int, summary: Mapping[str, Mapping[str, Any]]) -> Point:
    """Of the summary of a run's results."""
    kept = _mean(summary, KEEP)
    kept = _mean(summary, (KEEP_ELSE,)) if kept is None else kept
    perplexity = (summary.get("perplexity") or {}).get("value")
    leak = _mean(summary, FORGET)
    assert leak is not None and kept is not None  # noqa: S101 - there are facts, and retain facts
    return Point(arm, trial, seed, leak, kept, math.inf if perplexity is None else perplexity)


def _mean(summary: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> float | None:
    found = [v for name in names if (v := (summary.get(name) or {}).get("value")) is not None]
    return sum(found) / len(found) if found else None


def best(points: Sequence[Point]) -> Point | None:
    """The trial of a method that is shown: of the highest score, then of the lowest perplexity, then the first."""
    return min(points, key=lambda p: (-p.score, p.perplexity, p.trial), default=None)


def matched(points: Sequence[Point], level: float) -> Point | None:
    """The trial that keeps most among those that leak at most ``level``; None: none does."""
    enough = [p for p in points if p.leak <= level]
    return min(enough, key=lambda p: (-p.kept, p.perplexity, p.trial), default=None)


def shown(points: Sequence[Point], level: float) -> list[int]:
    """Trials of a method that are shown: the best and the matched one, each once; with more trials none comes back."""
    found = (best(points), matched(points, level))
    return list(dict.fromkeys(point.trial for point in found if point is not None))


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (leak, kept), whether no other leaks as little and keeps as much, and one of both strictly better."""
    return [
        not any(a <= leak and b >= kept and (a < leak or b > kept) for a, b in points if (a, b) != (leak, kept))
        for leak, kept in points
    ]


def over_seeds(values: Sequence[float], level: float = 0.95) -> Value:
    """Mean of one number a seed, with Student's t interval of it; rates are not cut at 0 and 1.

    Raises:
        ValueError: no values.
    """
    from scipy import stats

    if not values:
        raise ValueError("over_seeds: no values")
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Value(mean, items=1, reason="one seed: no interval over seeds")
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * spread
    return Value(mean, mean - half, mean + half, len(values))
