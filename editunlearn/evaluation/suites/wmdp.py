"""WMDP (Li et al. 2024, arXiv 2403.03218): multiple-choice questions on dangerous knowledge; chance is 25%.

Accuracy alone says little: a model that answers at random has "forgotten" everything. Read it beside what the model
still knows (``lm-eval:mmlu``, or ``rwku``'s utility).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editunlearn.evaluation.results import Measured, Value
from editunlearn.evaluation.suites import Part, Record, Source
from editunlearn.evaluation.suites.choice import check_choices, choice_probe

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

HUB = "cais/wmdp"
TOPICS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}


def read(which: str, source: Source) -> list[tuple[str, Record]]:
    """Questions of one topic, each with the topic's name."""
    place = f"{HUB}:wmdp-{which}"
    rows = source.rows(place, ("question", "choices", "answer"))
    check_choices(rows, place)
    return [(which, row) for row in rows]


def parts(lm: LM, data: Sequence[tuple[str, Record]]) -> list[Part]:
    """Which letter is the likeliest."""
    probes = [choice_probe(lm, row, topic=TOPICS[which]) for which, row in data]
    return [Part(f"wmdp_{data[0][0]}", probes, ("chosen",))]


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:  # noqa: ARG001 - as all suites
    """How far accuracy is above chance, 0 to 1."""
    name = next(iter(measured.parts))
    accuracy = Value.mean(measured.values(name, "chosen"))
    above = accuracy.mapped(lambda share: (share - 0.25) / 0.75, "0: like guessing, 1: all right")
    return {f"{name}_above_chance": above}
