"""All runs of a comparison: first every trial of every method, then what is shown with every seed.

Several processes deal them out among themselves; each run is made by one of them, alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from editunlearn.comparing import gold, views
from editunlearn.comparing.asking import TEST
from editunlearn.comparing.queue import Cell, Cost, Queue
from editunlearn.errors import InputError, NumericalError
from editunlearn.evaluation.states import BASE

if TYPE_CHECKING:
    from editunlearn.comparing.sweep import Arm
    from editunlearn.comparing.views import Point
    from editunlearn.console import Console
    from editunlearn.hparams import Moments
    from editunlearn.lm.layout import Site
    from editunlearn.lm.processes import Processes

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Runs:
    """What came of one method.

    Attributes:
        trials: on the validation half, those that did not fail.
        chosen, matched: trials that are shown; None: there is none.
        failed: run -> reason.
        test: (trial, seed) -> summary on the test half.
        costs: (trial, seed) -> cost.
    """

    arm: Arm
    trials: list[Point] = field(default_factory=list)
    chosen: int | None = None
    matched: int | None = None
    failed: dict[str, str] = field(default_factory=dict)
    test: dict[tuple[int, int], Mapping[str, Any]] = field(default_factory=dict)
    costs: dict[tuple[int, int], Cost] = field(default_factory=dict)


def run(queue: Queue, arms: Sequence[Arm], among: Processes, console: Console) -> tuple[dict[str, Record], list[Runs]]:
    """Summaries of the models without an edit on the test half, by name (:data:`BASE` and, where there is one, the
    reference), and what came of each method; all processes get all of it.

    Raises:
        Exception: what a run raised that says nothing about its method, when the other processes have made the rest.
    """
    _measure_moments(queue, arms, among)
    trials = [Cell(arm, number) for arm in arms for number in range(len(arm.trials))]
    console.info(f"the unedited model, and {len(trials)} trials of {len(arms)} methods")
    with console.progress(len(trials) + 1, "trials") as bar:
        base, *tried = among.dealt(
            "trials", [None, *trials], lambda cell: queue.base() if cell is None else _tried(queue, cell), bar.update
        )
    points: dict[str, list[Point]] = {arm.name: [] for arm in arms}
    for cell, record in zip(trials, tried, strict=True):
        if (point := queue.point(cell, record)) is not None:
            points[cell.arm.name].append(point)
    tests = [
        Cell(arm, trial, seed, test=True)
        for arm in arms
        for trial in views.shown(points[arm.name], queue.level)
        for seed in range(queue.seeds)
    ]
    console.info(f"what is shown of them, with each of {queue.seeds} seeds, on the other half")
    with console.progress(len(tests), "tests") as bar:
        tested = among.dealt("tests", tests, queue.record, bar.update)
    records = list(zip([*trials, *tests], [*tried, *tested], strict=True))
    found = [_of_method(arm, points[arm.name], records, queue.level) for arm in arms]
    return {BASE: base[TEST], **({gold.FOLDER: queue.never} if queue.never is not None else {})}, found


def _tried(queue: Queue, cell: Cell) -> Record:
    record = queue.record(cell)
    queue.forget_beaten(cell.arm)
    return record


def _of_method(arm: Arm, points: list[Point], records: Sequence[tuple[Cell, Record]], level: float) -> Runs:
    best, enough = views.best(points), views.matched(points, level)
    found = Runs(arm, points, best.trial if best else None, enough.trial if enough else None)
    for cell, record in (one for one in records if one[0].arm.name == arm.name):
        if record["reason"] is not None:
            found.failed[cell.name] = record["reason"]
        elif cell.test:
            found.test[cell.trial, cell.seed] = record[TEST]
            found.costs[cell.trial, cell.seed] = Cost(**record["cost"])
    return found


def _measure_moments(queue: Queue, arms: Sequence[Arm], among: Processes) -> None:
    """Second moments that runs will ask for: here the processes can share the text, in a run each is alone."""
    from editunlearn.editors import moments

    if among.world == 1:
        return

    def needed() -> list[tuple[list[Site], Moments]]:
        found: dict[str, tuple[list[Site], Moments]] = {}
        for arm in arms:
            for number, hp in enumerate(arm.trials):
                if queue.recorded(Cell(arm, number)) is None:
                    with suppress(InputError):  # which fails the run
                        if (one := queue.moments(hp)) is not None:
                            found.setdefault(repr((one[0], one[1].model_copy(update={"weight": 1.0}))), one)
        return list(found.values())

    together = replace(queue.lm, among=among)
    for sites, of in among.by_first(needed):
        with suppress(InputError, NumericalError):  # in all processes alike, and again in the run
            moments.get(together, sites, of, queue.cache, queue.console)
