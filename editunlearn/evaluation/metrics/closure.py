"""Deep unlearning (Wu et al. 2024, arXiv 2410.15153): a fact that follows from others is not gone while they stay."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from editunlearn.evaluation.metrics import Definition

DEFINITIONS = (
    Definition(
        "deep_recall",
        "higher",
        0,
        1,
        "largest share, over minimal sets of facts whose loss makes the target underivable, that was really lost",
        "arXiv 2410.15153",
        "the minimal sets are found by random search: it is a lower bound.",
    ),
    Definition(
        "deep_accuracy",
        "higher",
        0,
        1,
        "share of the facts outside of that minimal set that were not lost",
        "arXiv 2410.15153",
    ),
    Definition(
        "deep_success",
        "higher",
        0,
        1,
        "share of targets that do not follow from what the model still answers",
        "arXiv 2410.15153 (v4)",
        "a model that answers nothing has 1.",
    ),
)

Triple = tuple[str, str, str]
"""Subject, relation, object."""


@dataclass(frozen=True)
class Rule:
    """If all triples of ``body`` hold then ``head`` does; subjects and objects are variables.

    Attributes:
        body: conditions.
        head: what follows.
    """

    body: tuple[Triple, ...]
    head: Triple


def _bindings(rule: Rule, known: Mapping[str, set[tuple[str, str]]]) -> Iterator[dict[str, str]]:
    """Every way to fill the variables so that the body holds; different variables stand for different things."""

    def fill(place: int, bound: dict[str, str]) -> Iterator[dict[str, str]]:
        if place == len(rule.body):
            yield bound
            return
        one, relation, other = rule.body[place]
        for subject, thing in known.get(relation, ()):
            if bound.get(one, subject) != subject or bound.get(other, thing) != thing:
                continue
            more = {**bound, one: subject, other: thing}
            if len(set(more.values())) == len(more):
                yield from fill(place + 1, more)

    yield from fill(0, {})


def _filled(triple: Triple, bound: Mapping[str, str]) -> Triple:
    return bound[triple[0]], triple[1], bound[triple[2]]


Step = tuple[Triple, tuple[Triple, ...]]
"""What follows, from what."""


def steps(facts: Iterable[Triple], rules: Sequence[Rule]) -> list[Step]:
    """Every single step of reasoning among these facts: what follows, from what."""
    known: dict[str, set[tuple[str, str]]] = {}
    for subject, relation, thing in facts:
        known.setdefault(relation, set()).add((subject, thing))
    found = []
    for rule in rules:
        for bound in _bindings(rule, known):
            if rule.head[0] in bound and rule.head[2] in bound:
                found.append((_filled(rule.head, bound), tuple(_filled(part, bound) for part in rule.body)))
    return sorted(set(found))


def closure(facts: Iterable[Triple], rules: Sequence[Rule]) -> frozenset[Triple]:
    """All that follows from the facts, they themselves included."""
    known = set(facts)
    while True:
        new = {head for head, _ in steps(known, rules)} - known
        if not new:
            return frozenset(known)
        known |= new


def derivable(target: Triple, known: Iterable[Triple], all_steps: Sequence[Step]) -> bool:
    """Whether a fact is known or follows by these steps."""
    have, waiting = set(known), list(all_steps)
    while target not in have:
        new = {head for head, body in waiting if have.issuperset(body)} - have
        if not new:
            return False
        have |= new
        waiting = [step for step in waiting if step[0] not in have]
    return True


def minimal_set(target: Triple, facts: Iterable[Triple], all_steps: Sequence[Step], seed: int) -> frozenset[Triple]:
    """Facts without any of which the target would follow again, and without all of which it does not.

    Backwards from the target: of every step that leads to a lost fact one condition is lost, too, at random; then what
    is not needed is put back.

    Args:
        facts: closed under the rules.
        all_steps: every step among them, see :func:`steps`.
    """
    draw, whole = random.Random(seed), set(facts)
    lost, waiting = {target}, [target]
    while waiting:
        head = waiting.pop()
        for other, body in all_steps:
            if other == head and not lost & set(body):
                chosen = draw.choice(body)
                lost.add(chosen)
                waiting.append(chosen)
    needed = sorted(lost)
    draw.shuffle(needed)
    for one in needed:
        if one != target and not derivable(target, whole - (lost - {one}), all_steps):
            lost.discard(one)
    return frozenset(lost)


@dataclass(frozen=True)
class Deep:
    """How deeply one target was unlearned.

    Attributes:
        recall, accuracy: see :data:`DEFINITIONS`.
        success: the target does not follow from what is left.
    """

    recall: float
    accuracy: float
    success: bool


def deep_unlearning(
    target: Triple, facts: Sequence[Triple], lost: Iterable[Triple], rules: Sequence[Rule], *, tries: int = 100
) -> Deep:
    """Judge what was lost for a target.

    Args:
        facts: closed under the rules.
        lost: facts that the model does not answer any more.
        tries: random searches for minimal sets.
    """
    gone, best, all_steps = set(lost), (-1.0, 0.0), steps(facts, rules)
    for minimal in {minimal_set(target, facts, all_steps, seed) for seed in range(tries)}:
        others = len(facts) - len(minimal)
        accuracy = 1 - len(gone - minimal) / others if others else 1.0
        best = max(best, (len(gone & minimal) / len(minimal), accuracy))
    return Deep(*best, not derivable(target, [f for f in facts if f not in gone], all_steps))
