"""Metrics: pure functions on texts, token log-probabilities and lists of numbers. No model, no files.

Each module lists what it defines in ``DEFINITIONS``; ``docs/metrics.md`` is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Definition:
    """What a metric is, for people.

    Attributes:
        name: of the function.
        better: which way is better for an unlearned model, on what it was to forget unless ``of`` says otherwise.
        low, high: range; None: unbounded.
        formula: in words or symbols.
        source: paper or code that it is from, "" when it is this project's own.
        caution: what a reader could take wrongly.
    """

    name: str
    better: Literal["higher", "lower", "reference"]
    low: float | None
    high: float | None
    formula: str
    source: str = ""
    caution: str = ""
