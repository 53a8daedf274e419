"""What the runs of a comparison are asked: one half of everything chooses settings, the other half is reported."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.evaluation import results
from editunlearn.evaluation.running import Run, asked
from editunlearn.evaluation.states import slug
from editunlearn.evaluation.suites import Module, Part, is_facts
from editunlearn.evaluation.suites.facts import Request
from editunlearn.evaluation.treatments import halves

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.evaluation.reference import Other
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

VALIDATION, TEST = "validation", "test"
NEEDED = ("forget", "distracted", "paraphrases", "questions", "neighbors", "retain", "heldout", "text")
"""Parts of the suite facts that trials are compared by."""
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
        references: by suite, results of a model that never knew.
    """

    lm: LM
    halves: Mapping[str, Request]
    suites: Mapping[str, tuple[Module, Any]]
    facts_suite: tuple[str, Module]
    about: Mapping[str, Any]
    console: Console
    references: Mapping[str, Other] = field(default_factory=dict)
    _parts: dict[str, list[Part]] = field(default_factory=dict)

    def check_references(self) -> None:
        """Raise InputError where a reference was asked something else than the methods will be."""
        for name, other in self.references.items():
            self._ready(name)
            results.check_alike(asked(self._parts[name]), other.measured, "--reference")

    def ask(self, which: str, folder: Path, label: str, delta: Delta | None) -> dict[str, Any]:
        """The summary of the suite facts on a half; for the test, all other suites are measured too.

        Raises:
            NumericalError: the model's numbers are not finite.
        """
        from contextlib import nullcontext

        names = [which, *(self.suites if which == TEST else ())]
        for name in names:
            self._ready(name)
        found = {}
        with delta.applied(self.lm) if delta is not None else nullcontext():
            for name in names:
                file = folder / slug(name) / results.FILE
                found[name] = self._run(file, name, label, delta).measure(
                    self.lm, self._module(name), self._parts[name], self.console
                )
        summary: dict[str, Any] = found[which]["summary"]
        return summary

    @property
    def folders(self) -> dict[str, str]:
        """Names of the folders of the other benchmarks' results, by suite."""
        return {name: slug(name) for name in self.suites}

    def _module(self, name: str) -> Module:
        return self.facts_suite[1] if name in self.halves else self.suites[name][0]

    def _ready(self, name: str) -> None:
        """Make the parts of a suite, and let them look at the model before anything is applied."""
        if name in self._parts:
            return
        if name in self.halves:
            parts = self._module(name).parts(self.lm, self.halves[name])
            parts = [part for part in parts if name == TEST or part.name in NEEDED]
        else:
            module, data = self.suites[name]
            parts = module.parts(self.lm, data)
        for part in parts:
            part.prepare(self.lm, lambda _: None)
        self._parts[name] = parts

    def _run(self, file: Path, name: str, label: str, delta: Delta | None) -> Run:
        from editunlearn.workspace import key_of

        suite = self.facts_suite[0] if name in self.halves else name
        sha = delta.manifest.tensors_sha256 if delta is not None else None
        depends = {"suite": suite, "half": name if name in self.halves else None, "delta": sha, "under": None}
        about = {
            **self.about,
            **depends,
            "label": label,
            "method": delta.manifest.method if delta is not None else None,
            "limit": None,
            "key": key_of({**self.about, **depends}),
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return Run(file, about, self.references[name].measured if name in self.references else None)


def is_quick(name: str) -> bool:
    """Whether a suite is asked in halves."""
    return name == QUICK or is_facts(name)
