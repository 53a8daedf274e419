"""The queue: every run once, recorded when it is done or has failed; what is recorded is not run again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.artifacts import atomic_write_json, cached_json
from editunlearn.comparing import views
from editunlearn.comparing.asking import TEST, VALIDATION, Asking
from editunlearn.comparing.meter import Meter, OverBudget, peak_memory, reset_peak_memory, share_changed
from editunlearn.comparing.sweep import Arm, seeded
from editunlearn.comparing.views import Point
from editunlearn.errors import InputError, NumericalError
from editunlearn.run_folder import WORK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from editunlearn.comparing.meter import Budget
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import MethodHParams
    from editunlearn.lm.loading import LM

RECORD = "run.json"
"""The file of a run's folder that says that it is over, and how."""


@dataclass(frozen=True)
class Cost:
    """What one edit took, without measuring it and without what is made once for a model and cached.

    Attributes:
        seconds: wall time. flops, tokens: as :class:`Meter` counts them.
        memory: peak in bytes, the model included; None: this system does not tell.
        changed: share of the model's numbers that are changed.
        delta: bytes of the delta.
        resumed: the run was interrupted, so that time, operations and tokens are those of its last part only.
    """

    seconds: float
    flops: int
    tokens: int
    memory: int | None
    changed: float
    delta: int
    resumed: bool


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


@dataclass
class Queue:
    """Everything that the runs share.

    Attributes:
        facts: with targets. inputs: all that a run depends on beside its settings.
        level: leak of the matched view. seeds: how many.
        retry: run again what has failed.
    """

    lm: LM
    out: Path
    facts: Sequence[Fact]
    retain: Sequence[Fact]
    targets: str
    asking: Asking
    budget: Budget
    seeds: int
    level: float
    inputs: Mapping[str, Any]
    cache: Path
    console: Console
    retry: bool = False

    def base(self) -> dict[str, Mapping[str, Any]]:
        """The unedited model, by half."""
        where = self.out / "base"
        return {which: self.asking.ask(which, where, "base", None) for which in (VALIDATION, TEST)}

    def arm(self, arm: Arm, done: Callable[[], None]) -> Runs:
        """All runs of one method: its trials, then the trials that are shown with every seed, on the test half."""
        trials, failed = [], {}
        for number in range(len(arm.trials)):
            record = self._record(arm, number, 0)
            if record["reason"] is None:
                trials.append(views.point(arm.name, number, 0, record[VALIDATION]))
            else:
                failed[_name(number, 0)] = record["reason"]
            done()
        best, level = views.best(trials), views.matched(trials, self.level)
        shown = list(dict.fromkeys(point.trial for point in (best, level) if point is not None))
        found = Runs(arm, trials, best.trial if best else None, level.trial if level else None, failed)
        for trial in shown:
            for seed in range(self.seeds):
                record = self._record(arm, trial, seed, test=True)
                if record["reason"] is None:
                    found.test[trial, seed] = record[TEST]
                    found.costs[trial, seed] = Cost(**record["cost"])
                else:
                    failed[_name(trial, seed)] = record["reason"]
                done()
        for number in range(len(arm.trials)):
            # the numbers of others stay, and of one that diverged its last good state
            if number not in shown and _name(number, 0) not in failed:
                _forget_delta(self.folder(arm, number, 0))
        return found

    def folder(self, arm: Arm, trial: int, seed: int) -> Path:
        """Where a run is."""
        return self.out / "runs" / arm.folder / _name(trial, seed)

    def _record(self, arm: Arm, trial: int, seed: int, *, test: bool = False) -> dict[str, Any]:
        """The record of a run, which is run first where that has not been done."""
        from editunlearn.deltas.files import MANIFEST, load
        from editunlearn.hparams import resolved
        from editunlearn.workspace import key_of

        hp, folder = seeded(arm.trials[trial], seed), self.folder(arm, trial, seed)
        key = key_of({**self.inputs, "hparams": resolved(hp)})
        record: dict[str, Any] | None = cached_json(folder / RECORD, dict)
        if record is not None and (record.get("key") != key or (self.retry and record["reason"] is not None)):
            record = None
            shutil.rmtree(folder)
        which = TEST if test else VALIDATION
        if record is not None and (record["reason"] is not None or which in record):
            return record
        label = arm.name if seed == 0 else f"{arm.name}, seed {seed}"
        label = f"{label}, trial {trial}" if trial else label
        self.console.info(f"{arm.name}: trial {trial}, seed {seed}, {which}")
        about = {"arm": arm.name, "trial": trial, "seed": seed, "hparams": resolved(hp)}
        record = record or {"key": key, **about, "reason": None}
        try:
            if "cost" not in record or not (folder / MANIFEST).is_file():
                delta, cost = self._edit(hp, folder)
                record.setdefault("cost", asdict(cost))
                atomic_write_json(folder / RECORD, record)
            else:
                delta = load(folder, self.lm)
            record[which] = self.asking.ask(which, folder, label, delta)
        except (NumericalError, OverBudget, InputError, RuntimeError, MemoryError) as error:
            record["reason"] = _reason(error)
            self.console.warn(f"{arm.name}, {_name(trial, seed)} failed: {record['reason']}")
            if isinstance(error, OverBudget):
                _forget_delta(folder)  # of one that diverged, the last good state may be looked at
        atomic_write_json(folder / RECORD, record)
        return record

    def _edit(self, hp: MethodHParams, folder: Path) -> tuple[Delta, Cost]:
        """The delta of a run, saved, and what it took. With a budget an interrupted edit starts over."""
        from editunlearn.pipeline import forget

        self._prepare(hp)
        resumed = not self.budget and (folder / WORK).is_dir()
        told = reset_peak_memory()
        meter = Meter(self.lm, self.budget)
        with meter.running():
            outcome = forget(
                self.lm,
                self.facts,
                hp,
                retain=self.retain,
                targets=self.targets,
                out=folder,
                cache=self.cache,
                evaluate=False,
                fresh=bool(self.budget),
                console=self.console,
            )
        delta = outcome.delta
        changed = share_changed(self.lm, delta)
        memory = peak_memory() if told else None
        return delta, Cost(meter.seconds, meter.flops, meter.tokens, memory, changed, delta.nbytes, resumed)

    def _prepare(self, hp: MethodHParams) -> None:
        """Second moments are made once for a model and cached: no run is charged for them, as if they were there."""
        from editunlearn import editors
        from editunlearn.editors import located, moments
        from editunlearn.hparams import EditorHParams
        from editunlearn.lm.layers import resolve_layers

        if isinstance(hp, EditorHParams) and hp.moments.text != "none":
            default = editors.module(hp.method).DEFAULT_LAYERS
            where, _ = located.settled(self.lm, hp, self.cache, default)
            layers, _ = resolve_layers(where.layers, self.lm.layout.num_layers(self.lm.model), default)
            moments.get(self.lm, self.lm.layout.sites(layers), hp.moments, self.cache, self.console)


def _name(trial: int, seed: int) -> str:
    return f"trial{trial}-seed{seed}"


def _reason(error: BaseException) -> str:
    """In a few words.

    Raises:
        BaseException: the error itself, where it says nothing about the method.
    """
    from editunlearn.lm.batching import out_of_memory

    if isinstance(error, OverBudget | NumericalError | InputError):
        return str(error)
    if out_of_memory(error):
        return f"out of memory: {str(error).partition(chr(10))[0] or 'the system has no more'}"
    raise error


def _forget_delta(folder: Path) -> None:
    """Keep a run's numbers and drop its weights, unfinished ones included; the manifest goes first."""
    from editunlearn.deltas.files import MANIFEST

    for name in (MANIFEST, "delta.safetensors", "past_keys.safetensors"):
        (folder / name).unlink(missing_ok=True)
    if (folder / WORK).is_dir():
        shutil.rmtree(folder / WORK)
