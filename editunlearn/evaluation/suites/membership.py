"""Membership inference, in the benchmarks that have text of the same kind which was never trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editunlearn.evaluation.attacks.gradients import gradient_norms
from editunlearn.evaluation.metrics import memorisation
from editunlearn.evaluation.probes import row_of
from editunlearn.evaluation.results import Item, Measured, Value
from editunlearn.evaluation.suites import Part

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

SCORES = ("loss", "zlib_score", "min_k", "min_k_plus_plus")
"""Scores that come of one look at a text; all are low for what was trained on."""
GRADIENTS = "_gradients"
"""Behind the name of a part: the name of the one that has the gradient norms of its first items."""
GRADIENT_ITEMS = 20
"""Of each side; a backward pass through all weights takes seconds on a CPU."""
GRADIENT_TOKENS = 512
"""Of each text, the first so many: the logits of all of them are in memory at once, with their gradient."""


@dataclass
class Gradients(Part):
    """How large the gradient of each answer's loss is, without the closing token."""

    @property
    def looks(self) -> int:
        """See :class:`Part`."""
        return len(self.probes)

    @property
    def divisible(self) -> bool:
        """See :class:`Part`."""
        return True

    def items(self, lm: LM, progress: Callable[[int], None]) -> list[Item]:
        """See :class:`Part`."""
        rows = [row_of(lm, p, p.answer) for p in self.probes]
        ends = [None if p.prompt is None else -1 for p in self.probes]
        kept = [replace(row, ids=row.ids[:end]) for row, end in zip(rows, ends, strict=True)]
        cut = [replace(row, ids=row.ids[: row.prompt_length + GRADIENT_TOKENS]) for row in kept]
        norms = gradient_norms(lm, cut, progress)
        return [
            Item(p.shown, p.answer, None, p.group, {"gradient_norm": norm})
            for p, norm in zip(self.probes, norms, strict=True)
        ]


def gradient_parts(made: Sequence[Part], *names: str) -> list[Part]:
    """Gradient norms of the first items of the named parts."""
    return [Gradients(p.name + GRADIENTS, p.probes[:GRADIENT_ITEMS], ()) for p in made if p.name in names]


def membership(measured: Measured, reference: Measured | None, forget: str, holdout: str) -> dict[str, Value]:
    """For each score the AUC that tells the forget set from held-out text, what it says, and PrivLeak (Min-K%)."""
    found: dict[str, Value] = {}
    for score in (*SCORES, "gradient_norm"):
        sides = (forget, holdout) if score in SCORES else (forget + GRADIENTS, holdout + GRADIENTS)
        auc = _auc(measured, *sides, score)
        if auc is None:
            found[f"{score}_auc"] = Value(None, reason="no scores of held-out text")
            continue
        theirs = _auc(reference, *sides, score) if reference is not None else None
        found[f"{score}_auc"] = _value(auc, theirs)
        if score == "min_k":
            found["priv_leak"] = (
                Value(None, reason="needs the AUC of a model never trained on the forget set: --reference FILE")
                if theirs is None or theirs == 1
                else Value(memorisation.priv_leak(1 - auc, 1 - theirs))
            )
    return found | {"reference_score_auc": _against_reference(measured, reference, forget, holdout)}


def _value(auc: float, theirs: float | None) -> Value:
    verdict = memorisation.membership_verdict(auc, 0.5 if theirs is None else theirs)
    against = "0.5, there is no reference" if theirs is None else f"the reference's {theirs:.3f}"
    return Value(auc, reason=f"{verdict}, against {against}")


def _against_reference(measured: Measured, reference: Measured | None, forget: str, holdout: str) -> Value:
    """The AUC of each item's loss less the reference model's loss of the same item."""
    sides = []
    for part in (forget, holdout):
        own = measured.values(part, "loss")
        theirs = reference.values(part, "loss") if reference is not None else []
        if not own or len(own) != len(theirs):
            return Value(
                None,
                reason=f"needs each item's loss under a model never trained on the forget set: {len(own)} of {part} "
                f"here, {len(theirs)} in --reference FILE (results.json)",
            )
        sides.append([memorisation.reference_score(a, b) for a, b in zip(own, theirs, strict=True)])
    auc = memorisation.membership_auc(*sides)
    return Value(auc, reason=f"{memorisation.membership_verdict(auc)}, against 0.5, which the reference has by itself")


def _auc(measured: Measured, forget: str, holdout: str, score: str) -> float | None:
    members, others = measured.values(forget, score), measured.values(holdout, score)
    return memorisation.membership_auc(members, others) if members and others else None
