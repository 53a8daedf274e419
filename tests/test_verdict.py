"""What is said of relearning, with and without a model that never knew."""

from __future__ import annotations

from typing import Any

import pytest

from editunlearn.evaluation.report.gathering import Column
from editunlearn.evaluation.report.verdict import verdicts
from editunlearn.evaluation.results import Measured

RELEARN = "relearn:5:0.0001"


def column(label: str, *, edited: bool = True, under: str | None = None, weights: str = "w", **values: float) -> Column:
    """A column with these numbers in its summary, part and metric joined by two underscores."""
    summary: dict[str, Any] = {
        name.replace("__", "."): {"value": value, "items": 20, "low": 0.0, "high": 1.0, "reason": ""}
        for name, value in values.items()
    }
    about = {"summary": summary, "delta": "x" if edited else None, "under": under, "weights": weights}
    return Column(label, about, Measured({}))


BASE = column("base", edited=False, leak_gen=1.0, heldout__correct=1.0)
EDIT = column("memit", leak_gen=0.0, heldout__correct=1.0)


def relearned(share: float, **more: Any) -> Column:
    return column("memit-relearn-5-0.0001", under=RELEARN, leak_gen=share, **more)


def never_knew(share: float, **more: Any) -> Column:
    return column("never-knew-relearn-5-0.0001", edited=False, under=RELEARN, unknown__leak=share, **more)


@pytest.mark.parametrize(
    ("share", "never", "said", "good"),
    [
        (0.7, 0.05, "comes back: after relearn:5:0.0001.", False),
        (0.35, 0.30, "held against 1 way to bring it back.", True),  # such facts are guessed as often
        (0.0, 0.0, "held against 1 way to bring it back.", True),
        (0.7, None, "comes back: after relearn:5:0.0001.", False),
        (0.0, None, "Suppressed; not compared with a model that never knew: after relearn:5:0.0001.", True),
    ],
)
def test_relearning_beside_a_model_that_never_knew(share: float, never: float | None, said: str, good: bool) -> None:
    columns = [BASE, EDIT, relearned(share), *([never_knew(never)] if never is not None else [])]
    [found] = verdicts(columns)
    assert found.headline.endswith(said) and found.good == good
    line = next(line for line in found.lines if "other half" in line)
    assert f"after relearn:5:0.0001 on half of the facts: {share:.0%} of the other half come back" in line
    assert ("never knew such facts gets" in line) == (never is not None) == ("--unknown" not in line)


def test_a_reference_of_another_model_is_none() -> None:
    [found] = verdicts([BASE, EDIT, relearned(0.0), never_knew(0.0, weights="other")])
    assert "not compared" in found.headline


@pytest.mark.parametrize(
    ("share", "learned", "said"),
    [
        (0.0, 0.9, "held against 1 way to bring it back."),
        (0.0, 0.2, "Suppressed; taught too little to count: after relearn:5:0.0001."),
        (0.7, 0.2, "comes back: after relearn:5:0.0001."),
    ],
)
def test_relearning_that_teaches_nothing_proves_nothing(share: float, learned: float, said: str) -> None:
    [found] = verdicts([BASE, EDIT, relearned(share, taught__leak=learned), never_knew(0.0)])
    assert found.headline.endswith(said)
    assert any(
        f"({learned:.0%} of those shown are said): {share:.0%} of the other half" in line for line in found.lines
    )


def test_other_attacks_are_counted_by_themselves() -> None:
    rounded = column("memit-int4", under="int4", leak_gen=0.0)
    [found] = verdicts([BASE, EDIT, rounded, relearned(0.0)])
    assert "held against 1 way to bring it back; not compared with a model that never knew: after" in found.headline
