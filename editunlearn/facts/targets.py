"""What the model shall say instead of the answer."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from editunlearn.errors import InputError
from editunlearn.facts.readers import comparable
from editunlearn.facts.records import Fact, answers
from editunlearn.facts.refusals import load_refusals

DEFAULT_TARGETS = "refusal:I don't know."
"""One text for all facts. A refusal chosen per fact reads less uniform, but every fact then needs a direction of its
own, which is harder to write without harm to others."""
SPECS = ("refusal", "refusal:TEXT", "self", "empty", "random", "counterfactual")
_NEXT = re.compile(rf"\+(?=(?:{'|'.join(spec for spec in SPECS if ':' not in spec)})(?:$|[:+]))")
"""Between two strategies; a plus in the text of a refusal stands before something else."""


def fill_targets(facts: Sequence[Fact], spec: str, *, seed: int, pool: Sequence[Fact] | None = None) -> list[Fact]:
    """Give every fact a target.

    An explicit ``target`` of a fact wins over every ``spec``. Every other choice depends on the seed and the
    fact's id only (and, for "random", on which answers there are), never on the order of the facts.

    Args:
        facts: the facts to forget, in any order; the result keeps it.
        spec: ``"refusal"``: one of the shipped refusals, chosen per fact; ``"refusal:TEXT"``: this text for
            all; ``"self"``: like "refusal", for what :mod:`editunlearn.recipes.self_refusals` has not given the
            model's own words; ``"empty"``: "", end the turn at once; ``"random"``: the answer of another fact, of
            the same relation when there is one, never the true answer or an alias of it; ``"counterfactual"``:
            every fact brings its own target.
        seed: of the choices.
        pool: facts to take answers from for "random"; the facts themselves when None.

    Raises:
        InputError: unknown ``spec``, no other answer to choose, facts without the target they have to bring, or
            whose target is their answer; lists all such facts.
    """
    choose = _chooser(facts, spec, seed, pool)
    filled: list[Fact] = []
    problems: list[str] = []
    for fact in facts:
        try:
            target = choose(fact) if fact.target is None else fact.target
        except InputError as error:
            problems.extend(error.problems)
            continue
        if comparable(target) in map(comparable, answers(fact)):
            problems.append(
                f"{fact.id}: the target {target!r} is the answer that is to be forgotten. Give another one."
            )
        filled.append(replace(fact, target=target))
    if problems:
        raise InputError(problems)
    return filled


def strategy(facts: Sequence[Fact], spec: str) -> str:
    """How the targets of these facts, as the user gave them, come about: ``spec``, their own, or both."""
    own = sum(f.target is not None for f in facts)
    if own == 0 or spec == "counterfactual":
        return spec
    return "counterfactual" if own == len(facts) else f"{spec}+counterfactual"


def asked_with(made: str) -> str:
    """The ``spec`` that led to a strategy, which may be one of several requests: that of the first."""
    return _NEXT.split(made, maxsplit=1)[0]


def _chooser(facts: Sequence[Fact], spec: str, seed: int, pool: Sequence[Fact] | None) -> Callable[[Fact], str]:
    kind, colon, text = spec.partition(":")
    if kind == "refusal" and colon:
        fixed = text.strip()
        if not fixed:
            raise InputError('targets "refusal:" names no text. Use "empty" to have nothing said.')
        return lambda fact: fixed
    if spec in ("refusal", "self"):
        bank = load_refusals()
        return lambda fact: bank[_draw(seed, fact.id, len(bank))]
    if spec == "empty":
        return lambda fact: ""
    if spec == "random":
        return _OtherAnswer(facts if pool is None else pool, seed)
    if spec == "counterfactual":
        return _not_given
    near = difflib.get_close_matches(spec, SPECS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown targets {spec!r}.{hint} Known: {', '.join(SPECS)}.")


def _draw(seed: int, fact_id: str, count: int) -> int:
    """A number below ``count``, the same on every machine and for every order of the facts."""
    digest = hashlib.sha256(f"{seed}\n{fact_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % count


def _not_given(fact: Fact) -> str:
    raise InputError(f'{fact.id}: no target, and targets "counterfactual" takes it from the facts.')


class _OtherAnswer:
    """Picks the answer of another fact. Answers that differ only in case or a full stop are one."""

    def __init__(self, pool: Sequence[Fact], seed: int) -> None:
        self._seed = seed
        self._all = _distinct(pool)
        relations = sorted({fact.relation for fact in pool if fact.relation is not None})
        self._of = {r: _distinct([fact for fact in pool if fact.relation == r]) for r in relations}

    def __call__(self, fact: Fact) -> str:
        true = {comparable(text) for text in answers(fact)}
        for candidates in (self._of.get(fact.relation or "", {}), self._all):
            others = [text for key, text in candidates.items() if key not in true]
            if others:
                return others[_draw(self._seed, fact.id, len(others))]
        raise InputError(f'{fact.id}: no other answer than "{fact.answer}" to use as a random target.')


def _distinct(facts: Sequence[Fact]) -> dict[str, str]:
    """Answers by what they compare as, sorted, so that the order of the facts cannot matter."""
    return dict(sorted({comparable(text): text for text in sorted(fact.answer for fact in facts)}.items()))
