"""What is done to a model before it is asked: weights rounded, facts learned again, written directions taken out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from editunlearn.errors import InputError
from editunlearn.evaluation.attacks import quantisation
from editunlearn.evaluation.attacks.relearning import RATES, Relearn, relearned
from editunlearn.evaluation.attacks.subspace import ablated
from editunlearn.lm.tokens import Row, encode, wrap
from editunlearn.naming import did_you_mean

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

COUNTED: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "relearn": (5, "steps of fine-tuning all weights on half of the facts; the other half is asked"),
        "relearn-lora": (5, "the same with an adapter of rank 8"),
        "relearn-retain": (5, "steps of fine-tuning all weights on the facts to keep: related text, no forgotten fact"),
        "subspace": (1, "strongest directions that the edit writes in, taken out"),
    }
)
"""By kind, the number that stands behind its colon if none is given, and what it counts."""


RELEARNING: Mapping[str, Literal["full", "lora"]] = MappingProxyType(
    {"relearn": "full", "relearn-lora": "lora", "relearn-retain": "full"}
)
"""Kinds that fine-tune, and what they train; behind their number may stand a learning rate and a seed."""


@dataclass(frozen=True)
class Treatment:
    """One of them.

    Attributes:
        kind: a scheme of :mod:`editunlearn.evaluation.attacks.quantisation`, or a name in ``COUNTED``.
        count: of what ``COUNTED`` says; 0 for quantisation.
        relearn: how it fine-tunes, for the kinds in ``RELEARNING``.
    """

    kind: str
    count: int = 0
    relearn: Relearn | None = None

    def __str__(self) -> str:
        """All that :func:`parse` needs to make the same one; the learning rate is always said."""
        parts = [self.kind, *([str(self.count)] if self.count else [])]
        if self.relearn is not None:
            parts += [f"{self.relearn.rate:g}", *([str(self.relearn.seed)] if self.relearn.seed else [])]
        return ":".join(parts)

    def label(self, state: str) -> str:
        """Of a state under this treatment; also a folder's name."""
        return f"{state}-{str(self).replace(':', '-')}"

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be given beside the model: ``facts``, ``retain``."""
        if self.relearn is None:
            return ()
        return ("facts",) if self.halves else ("retain",)

    @property
    def of_delta(self) -> bool:
        """Whether it is an attack on an edit, which says nothing of a model without one."""
        return self.kind == "subspace"

    @property
    def of_weights(self) -> bool:
        """Whether it needs an edit that changes weights."""
        return self.of_delta or self.kind in quantisation.SCHEMES

    @property
    def halves(self) -> bool:
        """Whether it shows the model half of the facts, so that only the others can be asked."""
        return self.relearn is not None and self.kind != "relearn-retain"

    def shown(self, facts: Sequence[Fact], retain: Sequence[Fact]) -> Sequence[Fact]:
        """What it trains on, of the facts that were to be forgotten and of those to be kept."""
        if self.relearn is None:
            return ()
        return halves(facts)[0] if self.halves else retain

    @contextmanager
    def on(
        self,
        lm: LM,
        delta: Delta | None,
        facts: Sequence[Fact],
        retain: Sequence[Fact],
        console: Console | None = None,
    ) -> Iterator[None]:
        """The model with ``delta``, treated, inside; as it was afterwards.

        Args:
            facts: all that were to be forgotten. retain: to be kept.

        Raises:
            InputError: there is nothing to learn again.
        """
        if self.kind in quantisation.SCHEMES:
            with quantisation.quantised(lm, self.kind, delta, console):
                yield
        elif self.kind == "subspace":
            assert delta is not None  # noqa: S101 - the plan leaves such a state out
            with ablated(lm, delta, self.count):
                yield
        else:
            assert self.relearn is not None  # noqa: S101 - there are no other kinds
            rows = [answered(lm, fact) for fact in self.shown(facts, retain)]
            with (
                delta.applied(lm) if delta is not None else nullcontext(),
                relearned(lm, rows, self.relearn, console),
            ):
                yield


def answered(lm: LM, fact: Fact) -> Row:
    """A fact's prompt with its true answer."""
    prompt = wrap(lm, fact.prompt, (fact.subject_start, fact.subject_end), question=fact.is_question)
    return encode(lm, prompt, fact.answer, "prompt_last")


def halves(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """Facts that an attacker knows, and the others; where there are several subjects, none is in both.

    Facts about one subject stay together, because one of them says much about the others. No seed changes the halves:
    runs with other seeds ask the same facts, so that they can be compared.
    """
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject.casefold(), []).append(fact)
    groups = list(by_subject.values()) if len(by_subject) > 1 else [[fact] for fact in facts]
    random.Random(0).shuffle(groups)
    known: list[Fact] = []
    others: list[Fact] = []
    for group in sorted(groups, key=len, reverse=True):  # large ones first, so that the halves come out even
        (known if len(known) < len(others) else others).extend(group)
    return known, others


def parse(text: str, seed: int = 0) -> Treatment:
    """``int4``, ``relearn:20``, ``relearn:20:1e-4`` and the like.

    Args:
        seed: of fine-tuning, unless the text has its own (``relearn:20:1e-4:7``).

    Raises:
        InputError: none of them.
    """
    kind, colon, rest = text.partition(":")
    if kind in quantisation.SCHEMES and not colon:
        return Treatment(kind)
    if kind not in COUNTED:
        known = (*quantisation.SCHEMES, *COUNTED)
        raise InputError(f"--under: unknown treatment {text!r}.{did_you_mean(kind, known)} Known: {', '.join(known)}.")
    default, counts = COUNTED[kind]
    count, *more = rest.split(":") if colon else [str(default)]
    if not (count.isascii() and count.isdigit() and int(count) > 0):
        raise InputError(f"--under: {text!r}: behind the colon stands a number from 1, of {counts}.")
    if kind in RELEARNING:
        rate, own_seed = _rate_and_seed(text, more, seed)
        what = RELEARNING[kind]
        hp = Relearn(int(count), rate if rate is not None else RATES[what], what=what, seed=own_seed)
        return Treatment(kind, hp.steps, hp)
    if more:
        raise InputError(f"--under: {text!r}: behind {kind} stands one number, of {counts}.")
    return Treatment(kind, int(count))


def _rate_and_seed(text: str, given: Sequence[str], seed: int) -> tuple[float | None, int]:
    """What stands behind the steps of relearning: the rate, None if it is not said, and the seed."""
    try:
        rate = float(given[0]) if given else None
        own_seed = int(given[1]) if len(given) > 1 else None
        if len(given) > 2 or (rate is not None and not 0 < rate < 1) or (own_seed or 0) < 0:
            raise ValueError
        return rate, seed if own_seed is None else own_seed
    except ValueError:
        raise InputError(
            f"--under: {text!r}: behind the steps may stand a learning rate between 0 and 1, and behind that a seed "
            "from 0: relearn:5:1e-4 or relearn:5:1e-4:7."
        ) from None
