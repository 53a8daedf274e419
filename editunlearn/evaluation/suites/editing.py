"""What CounterFact and zsRE have in common: own prompts, paraphrases and prompts beside, turned to forgetting."""

from __future__ import annotations

from editunlearn.evaluation.results import Measured, Value

EFFICACY, GENERALIZATION, LOCALITY = PARTS = ("efficacy", "generalization", "locality")
PORTABILITY = "portability"
"""What follows from the new answer, in the benchmarks that ask for it."""


def editing_totals(measured: Measured, *, teacher_forced: str, kept: str) -> dict[str, Value]:
    """The numbers of the editing literature; all better when higher.

    Args:
        measured: with the parts ``PARTS``.
        teacher_forced: metric of the true answer without decoding.
        kept: metric that says whether decoded text has the true answer of a prompt beside.
    """
    found: dict[str, Value] = {}
    for name in (EFFICACY, GENERALIZATION):
        found[f"{name}_tf"] = Value.mean([1 - value for value in measured.values(name, teacher_forced)])
        found[f"{name}_gen"] = Value.mean([1 - value for value in measured.values(name, "leak")])
    for name in (LOCALITY, *(part for part in (PORTABILITY,) if part in measured.parts)):
        found[f"{name}_tf"] = Value.mean(measured.values(name, teacher_forced))
        found[f"{name}_gen"] = Value.mean(measured.values(name, kept))
    return found
