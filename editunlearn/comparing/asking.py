"""What the runs of a comparison are asked: one half of everything chooses settings, the other half is reported."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.evaluation import results
from editunlearn.evaluation.running import Run
from editunlearn.evaluation.states import State, slug
from editunlearn.evaluation.suites import Module, Part, is_facts
from editunlearn.evaluation.suites.facts import Request
from editunlearn.evaluation.treatments import halves

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.evaluation.results import Measured
    from editunlearn.evaluation.treatments import Treatment
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

VALIDATION, TEST = "validation", "test"
NEEDED = ("forget", "distracted", "paraphrases", "questions", "neighbors", "retain", "heldout", "text")
"""Parts of the suite facts that trials are compared by."""
TREATED = ("forget", "retain")
"""Parts of it that are asked of a treated model."""
QUICK = "quick"
"""Another name of the suite facts."""


def split(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """The halves by their names; no subject is in both."""
    return dict(zip((VALIDATION, TEST), halves(facts), strict=True))


def requests(
    facts: Sequence[Fact], retain: Sequence[Fact], heldout: Sequence[Fact], text: Sequence[str], *, attacks: bool
) -> dict[str, Request]:
    """What each half asks: of the facts to forget with all of their wordings and neighbours, of those to keep, of the
    text. Attacks are for the test alone."""
    forget, keep, out = split(facts), split(retain), split(heldout)
    passages = {VALIDATION: text[::2], TEST: text[1::2]}
    return {
        name: Request(
            forget[name],
            keep[name],
            out[name],
            passages[name],
            attacks=attacks and name == TEST,
            all_facts=facts,
            all_retain=retain,
        )
        for name in (VALIDATION, TEST)
    }


@dataclass
class Asking:
    """Measures a loaded model, with or without a delta; what is measured is kept part by part.

    Attributes:
        halves: from :func:`requests`.
        suites: by name, other benchmarks that are asked for the test: their file and data.
        about: what every results file says of the comparison.
        treatments: after which the test half is asked once more.
        references: by what is asked, what a model that never knew made of it.
        compares: whether parts that compare with the unedited model are asked; not of a model that is another one.
    """

    lm: LM
    halves: Mapping[str, Request]
    suites: Mapping[str, tuple[Module, Any]]
    facts_suite: tuple[str, Module]
    about: Mapping[str, Any]
    console: Console
    treatments: Sequence[Treatment] = ()
    references: Mapping[str, Measured] = field(default_factory=dict)
    compares: bool = True
    _parts: dict[str, list[Part]] = field(default_factory=dict, init=False)

    def ask(self, which: str, folder: Path, label: str, delta: Delta | None) -> dict[str, Any]:
        """The summary of the suite facts on a half; for the test also those of all other suites and of the test half
        under each treatment, their names behind that of the suite or the treatment (:func:`beside`).

        Raises:
            NumericalError: the model's numbers are not finite.
        """
        everything = self.halves[which]
        summary: dict[str, Any] = {}
        for state in self._states(which, label, delta):
            names = [which, *(self.suites if which == TEST and state.under is None else ())]
            for name in (name for name in names if name not in self._parts):
                self._parts[name] = self.parts(name)
            with state.on(self.lm, everything.all_facts, everything.all_retain, self.console):
                for name in names:
                    under, parts = state.under, self._parts[name]
                    place = name if under is None else str(under)
                    asked = parts if under is None else [part for part in parts if part.name in TREATED]
                    run = self._run(folder / slug(place) / results.FILE, name, state)
                    found = run.measure(self.lm, self._module(name), asked, self.console)["summary"]
                    summary |= found if place == which else {beside(place, key): v for key, v in found.items()}
        return summary

    def places(self, which: str) -> dict[str, str]:
        """By what is asked on a half, the folder of its results; a treatment may be missing that means nothing."""
        others = [*self.suites, *map(str, self.treatments)] if which == TEST else []
        return {name: slug(name) for name in (which, *others)}

    def parts(self, name: str) -> list[Part]:
        """The parts of a suite, which have looked at the model; nothing is applied to it."""
        if name in self.halves:
            parts = self._module(name).parts(self.lm, self.halves[name])
            parts = [part for part in parts if name == TEST or part.name in NEEDED]
        else:
            module, data = self.suites[name]
            parts = module.parts(self.lm, data)
        parts = [part for part in parts if self.compares or not part.looks_before]
        for part in parts:
            part.prepare(self.lm, lambda _: None)
        return parts

    def _states(self, which: str, label: str, delta: Delta | None) -> list[State]:
        """As it is, and under each treatment that means something for it."""
        kept = [under for under in self.treatments if which == TEST and applies(under, delta)]
        return [State(label, delta, None), *(State(under.label(label), delta, under) for under in kept)]

    def _module(self, name: str) -> Module:
        return self.facts_suite[1] if name in self.halves else self.suites[name][0]

    def _run(self, file: Path, name: str, state: State) -> Run:
        from editunlearn.workspace import key_of

        made = state.delta.manifest if state.delta is not None else None
        under = None if state.under is None else str(state.under)
        depends = {
            "suite": self.facts_suite[0] if name in self.halves else name,
            "half": name if name in self.halves else None,
            "delta": made.tensors_sha256 if made is not None else None,
            "under": under,
        }
        about = {
            **self.about,
            **depends,
            "label": state.label,
            "method": made.method if made is not None else None,
            "limit": None,
            "key": key_of({**self.about, **depends}),
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return Run(file, about, self.references.get(under or name))


def beside(place: str, name: str) -> str:
    """Name of a number of another suite, or of the test half under a treatment, among those of the test half."""
    return f"{place} {name}"


def applies(under: Treatment, delta: Delta | None) -> bool:
    """Whether a treatment means something for a model with this delta: rounding says nothing of a memory."""
    from editunlearn.deltas.memory import MemoryDelta

    if delta is None:
        return not under.of_delta
    return not (under.of_weights and isinstance(delta, MemoryDelta))


def is_quick(name: str) -> bool:
    """Whether a suite is asked in halves."""
    return name == QUICK or is_facts(name)
