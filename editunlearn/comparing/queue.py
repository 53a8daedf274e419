"""The queue: every run once, recorded when it is done or has failed; what is recorded is not run again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
    from editunlearn.hparams import MethodHParams, Moments
    from editunlearn.lm.layout import Site
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
class Cell:
    """One run of a comparison: a method's trial with a seed, asked on the validation half or on the test half."""

    arm: Arm
    trial: int
    seed: int = 0
    test: bool = False

    @property
    def name(self) -> str:
        """Of its folder; both halves are asked of the same edit."""
        return f"trial{self.trial}-seed{self.seed}"

    @property
    def half(self) -> str:
        """What it is asked."""
        return TEST if self.test else VALIDATION

    @property
    def hparams(self) -> MethodHParams:
        """Its settings."""
        return seeded(self.arm.trials[self.trial], self.seed)


@dataclass
class Queue:
    """Everything that the runs share.

    Attributes:
        facts: with targets. how: what those came of. inputs: all that a run depends on beside its settings.
        never: what a model that never knew gives on the test half; None: there is none, or it is not known.
        level: leak of the matched view. seeds: how many.
        retry: run again what has failed.
    """

    lm: LM
    out: Path
    facts: Sequence[Fact]
    retain: Sequence[Fact]
    how: str
    asking: Asking
    never: Mapping[str, Any] | None
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

    def folder(self, cell: Cell) -> Path:
        """Where a run is."""
        return self.out / "runs" / cell.arm.folder / cell.name

    def recorded(self, cell: Cell) -> dict[str, Any] | None:
        """What is known of a run; None: nothing, or only of one with other settings or inputs."""
        record: dict[str, Any] | None = cached_json(self.folder(cell) / RECORD, dict)
        return record if record is not None and record.get("key") == self._key(cell) else None

    def record(self, cell: Cell) -> dict[str, Any]:
        """The record of a run, which is run first where that has not been done."""
        from editunlearn.deltas.files import MANIFEST, load
        from editunlearn.hparams import resolved

        folder, record = self.folder(cell), self.recorded(cell)
        if (record is None and (folder / RECORD).exists()) or (self.retry and record and record["reason"] is not None):
            record = None
            shutil.rmtree(folder)
        if record is not None and (record["reason"] is not None or cell.half in record):
            return record
        hp, name = cell.hparams, cell.arm.name
        label = name if cell.seed == 0 else f"{name}, seed {cell.seed}"
        label = f"{label}, trial {cell.trial}" if cell.trial else label
        self.console.info(f"{name}: trial {cell.trial}, seed {cell.seed}, {cell.half}")
        about = {"arm": name, "trial": cell.trial, "seed": cell.seed, "hparams": resolved(hp)}
        record = record or {"key": self._key(cell), **about, "reason": None}
        try:
            if "cost" not in record or not (folder / MANIFEST).is_file():
                delta, cost = self._edit(hp, folder)
                record.setdefault("cost", asdict(cost))
                record["hparams"] = delta.manifest.hparams  # with what was found for this model
                atomic_write_json(folder / RECORD, record)
            else:
                delta = load(folder, self.lm)
            record[cell.half] = self.asking.ask(cell.half, folder, label, delta)
        except (NumericalError, OverBudget, InputError, RuntimeError, MemoryError) as error:
            record["reason"] = _reason(error)
            self.console.warn(f"{name}, {cell.name} failed: {record['reason']}")
            if isinstance(error, OverBudget):
                _forget_delta(folder)  # of one that diverged, the last good state may be looked at
        atomic_write_json(folder / RECORD, record)
        return record

    def point(self, cell: Cell, record: Mapping[str, Any]) -> Point | None:
        """A trial as the views see it; None: it failed, or has not been asked yet."""
        if record["reason"] is not None or VALIDATION not in record:
            return None
        return views.point(cell.arm.name, cell.trial, cell.seed, record[VALIDATION])

    def forget_beaten(self, arm: Arm) -> None:
        """Of trials that will not be shown, whatever the others bring, keep the numbers alone."""
        cells = [Cell(arm, number) for number in range(len(arm.trials))]
        points = [p for cell in cells if (r := self.recorded(cell)) and (p := self.point(cell, r))]
        shown = views.shown(points, self.level)
        for point in points:
            if point.trial not in shown:
                _forget_delta(self.folder(cells[point.trial]))

    def _key(self, cell: Cell) -> str:
        from editunlearn.hparams import resolved
        from editunlearn.workspace import key_of

        return key_of({**self.inputs, "hparams": resolved(cell.hparams)})

    def _edit(self, hp: MethodHParams, folder: Path) -> tuple[Delta, Cost]:
        """The delta of a run, saved, and what it took. With a budget an interrupted edit starts over."""
        from editunlearn.editors import moments
        from editunlearn.pipeline import forget

        if (needed := self.moments(hp)) is not None:  # no run is charged for them, as if they were there
            moments.get(self.lm, *needed, self.cache, self.console)
        resumed = not self.budget and (folder / WORK).is_dir()
        told = reset_peak_memory()
        meter = Meter(self.lm, self.budget)
        with meter.running():
            outcome = forget(
                self.lm,
                self.facts,
                hp,
                retain=self.retain,
                how=self.how,
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

    def moments(self, hp: MethodHParams) -> tuple[list[Site], Moments] | None:
        """The second moments that a method needs: where, and of which text; None: it needs none.

        Raises:
            InputError: blocks that the model does not have, or has not been traced for.
        """
        from editunlearn import editors
        from editunlearn.editors import located
        from editunlearn.hparams import EditorHParams
        from editunlearn.lm.layers import resolve_layers

        if not isinstance(hp, EditorHParams) or hp.moments.text == "none":
            return None
        default = editors.module(hp.method).DEFAULT_LAYERS
        where, _ = located.settled(self.lm, hp, self.cache, default)
        layers, _ = resolve_layers(where.layers, self.lm.layout.num_layers(self.lm.model), default)
        return self.lm.layout.sites(layers), hp.moments


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
