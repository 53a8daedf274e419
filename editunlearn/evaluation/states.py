"""In what states a model is measured: bare or with an edit, as it is or treated."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editunlearn.deltas.kinds import written
from editunlearn.errors import InputError

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.evaluation.treatments import Treatment
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

BASE = "base"
"""Label of the model without an edit."""
NEVER_KNEW = "never-knew"
"""Label of the model without an edit, taught facts that it never knew."""


@dataclass(frozen=True)
class State:
    """A model as it is to be measured.

    Attributes:
        label: of its column, and of its folder.
        delta: applied to the model, if any.
        under: what is done to it besides, if anything.
        unknown: facts that the model never knew, taught and asked in place of those that were to be forgotten; empty:
            it is asked what every other state is.
    """

    label: str
    delta: Delta | None
    under: Treatment | None
    unknown: tuple[Fact, ...] = ()

    def taught(self, facts: Sequence[Fact], retain: Sequence[Fact]) -> Sequence[Fact]:
        """What the model is fine-tuned on, of the same facts that :meth:`on` is given."""
        return self.under.shown(self.unknown or facts, retain) if self.under is not None else ()

    @property
    def halves(self) -> bool:
        """Whether only half of the facts can be asked, because the others are shown to the model."""
        return self.under is not None and self.under.halves

    def on(
        self, lm: LM, facts: Sequence[Fact], retain: Sequence[Fact], console: Console
    ) -> AbstractContextManager[Any]:
        """The model is in this state inside; ``facts`` and ``retain`` are what an attacker may train on."""
        if self.under is not None:
            return self.under.on(lm, self.delta, self.unknown or facts, retain, console)
        return self.delta.applied(lm) if self.delta is not None else nullcontext()


def states(
    deltas: Sequence[tuple[str, Delta]],
    treatments: Sequence[Treatment],
    *,
    base: bool,
    unknown: Sequence[Fact] = (),
) -> tuple[list[State], list[str]]:
    """Every edit, and the bare model if ``base`` or if there is no edit; each as it is and under each treatment.

    Args:
        deltas: label and edit.
        unknown: facts that the model never knew: for each relearning, what that makes of a model that never knew.

    Returns:
        the states, and notes about what is left out.

    Raises:
        InputError: two states of one label.
        UnsupportedError: a treatment of changed weights, and an edit that changes none.
    """
    bare = [(BASE, None)] if base or not deltas else []
    found, notes = [], []
    for label, delta in [*bare, *deltas]:
        found.append(State(label, delta, None))
        for under in dict.fromkeys(treatments):
            if delta is not None and under.of_weights:
                written(delta, f"--under {under}, {label}")
            if delta is None and under.of_delta:
                notes.append(f"{under} is left out for {label}, which has no edit.")
            else:
                found.append(State(under.label(label), delta, under))
    relearnings = [under for under in dict.fromkeys(treatments) if under.relearn and unknown]
    found += [State(under.label(NEVER_KNEW), None, under, tuple(unknown)) for under in relearnings]
    labels = [state.label for state in found]
    names = [label for label, _ in deltas]
    twice = [label for label in labels if labels.count(label) > 1 or (label == BASE and BASE in names)]
    if twice:
        raise InputError(
            f"--delta: two states would be named {twice[0]!r}, and their results go to one place. Rename a folder."
        )
    return found, notes


def slug(suite: str) -> str:
    """Name of a folder for a suite, whatever stands behind its colon."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", suite).strip("-.")
    return plain if len(plain) <= 60 else f"{plain[:50]}-{hashlib.sha256(suite.encode()).hexdigest()[:8]}"
