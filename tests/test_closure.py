"""Deep unlearning against a family worked by hand and against exhaustive search."""

from __future__ import annotations

import random
from itertools import chain, combinations

import pytest

from editunlearn.evaluation.metrics.closure import Rule, Triple, closure, deep_unlearning, minimal_set, steps

GRANDMOTHER = Rule((("x", "mother", "y"), ("y", "mother", "z")), ("x", "grandmother", "z"))
MARRIED = Rule((("x", "wife", "y"),), ("y", "husband", "x"))
ANA, EVA, TARGET = ("Ana", "mother", "Eva"), ("Eva", "mother", "Ida"), ("Ana", "grandmother", "Ida")


def test_a_family_by_hand() -> None:
    facts = closure([ANA, EVA, ("Tom", "wife", "Eva")], [GRANDMOTHER, MARRIED])
    assert facts == {ANA, EVA, TARGET, ("Tom", "wife", "Eva"), ("Eva", "husband", "Tom")}
    all_steps = steps(facts, [GRANDMOTHER, MARRIED])
    minimal = {minimal_set(TARGET, facts, all_steps, seed) for seed in range(20)}
    assert minimal == {frozenset({TARGET, ANA}), frozenset({TARGET, EVA})}
    ordered = sorted(facts)
    shallow = deep_unlearning(TARGET, ordered, [TARGET], [GRANDMOTHER, MARRIED])
    assert (shallow.recall, shallow.accuracy, shallow.success) == (0.5, 1.0, False)
    deep = deep_unlearning(TARGET, ordered, [TARGET, EVA, ("Tom", "wife", "Eva")], [GRANDMOTHER, MARRIED])
    assert (deep.recall, deep.accuracy, deep.success) == (1.0, pytest.approx(2 / 3), True)


def test_nobody_is_their_own_relative() -> None:
    circle = [("Ana", "mother", "Eva"), ("Eva", "mother", "Ana")]
    assert closure(circle, [GRANDMOTHER]) == set(circle)  # x and z are different people


@pytest.mark.parametrize("seed", range(6))
def test_minimal_sets_are_minimal(seed: int) -> None:
    draw = random.Random(seed)
    people = ["a", "b", "c", "d", "e"]
    rules = [
        Rule((("x", "near", "y"), ("y", "near", "z")), ("x", "far", "z")),
        Rule((("x", "far", "y"), ("y", "near", "z")), ("x", "away", "z")),
        Rule((("x", "near", "y"), ("y", "far", "z")), ("x", "away", "z")),
    ]
    given = [(one, "near", other) for one in people for other in people if one != other and draw.random() < 0.3]
    facts = sorted(closure(given, rules))
    derived = [fact for fact in facts if fact[1] == "away"]
    for target in derived[:3]:

        def follows(lost: frozenset[Triple], target: Triple = target) -> bool:
            return target in closure([f for f in facts if f not in lost], rules)

        found = minimal_set(target, facts, steps(facts, rules), seed)
        assert target in found and not follows(found)
        smaller = chain.from_iterable(combinations(sorted(found - {target}), n) for n in range(len(found) - 1))
        assert all(follows(frozenset({target, *part})) for part in smaller)
