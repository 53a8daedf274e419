"""In what states a model is measured: bare or with an edit, as it is or with rounded weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editunlearn.errors import InputError
from editunlearn.evaluation.attacks.quantisation import check_scheme, quantised

if TYPE_CHECKING:
    from editunlearn.deltas.lowrank import LowRankDelta
    from editunlearn.lm.loading import LM

BASE = "base"
"""Label of the model without an edit."""


@dataclass(frozen=True)
class State:
    """A model as it is to be measured.

    Attributes:
        label: of its column, and of its folder.
        delta: applied to the model, if any.
        scheme: of quantisation, "" for none.
    """

    label: str
    delta: LowRankDelta | None
    scheme: str

    def on(self, lm: LM) -> AbstractContextManager[Any]:
        """The model is in this state inside."""
        if self.scheme:
            return quantised(lm, self.scheme, self.delta)
        return self.delta.applied(lm) if self.delta is not None else nullcontext()


def states(deltas: Sequence[tuple[str, LowRankDelta]], schemes: Sequence[str], *, base: bool) -> list[State]:
    """Every edit, and the bare model if ``base`` or if there is no edit; each as it is and under each scheme.

    Args:
        deltas: label and edit.

    Raises:
        InputError: an unknown scheme, or two states of one label.
    """
    for scheme in schemes:
        check_scheme(scheme)
    bare = [(BASE, None)] if base or not deltas else []
    found = [
        State(f"{label}-{scheme}" if scheme else label, delta, scheme)
        for label, delta in [*bare, *deltas]
        for scheme in ("", *dict.fromkeys(schemes))
    ]
    labels = [state.label for state in found]
    names = [label for label, _ in deltas]
    twice = [label for label in labels if labels.count(label) > 1 or (label == BASE and BASE in names)]
    if twice:
        raise InputError(
            f"--delta: two states would be named {twice[0]!r}, and their results go to one place. Rename a folder."
        )
    return found


def slug(suite: str) -> str:
    """Name of a folder for a suite, whatever stands behind its colon."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", suite).strip("-.")
    return plain if len(plain) <= 60 else f"{plain[:50]}-{hashlib.sha256(suite.encode()).hexdigest()[:8]}"
