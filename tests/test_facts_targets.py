"""What is said instead of the answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from editunlearn.errors import InputError
from editunlearn.facts.records import Fact, ForgetRequest, Neighbor, answers, content_hash
from editunlearn.facts.refusals import load_refusals
from editunlearn.facts.targets import asked_with, fill_targets, strategy


def _fact(name: str, answer: str, relation: str | None = None, target: str | None = None) -> Fact:
    prompt = f"The home of {name} is"
    return Fact(name, prompt, answer, name, prompt.index(name), relation=relation, target=target)


FACTS = [
    _fact("Ada", "Rome", "city"),
    _fact("Bob", "Oslo", "city"),
    _fact("Cyd", "Lima", "city"),
    _fact("Dan", "red", "color"),
    _fact("Eve", "blue", "color"),
]


def test_refusals_come_from_the_bank_and_depend_on_seed_and_id_only() -> None:
    first = {f.id: f.target for f in fill_targets(FACTS, "refusal", seed=3)}
    turned = {f.id: f.target for f in fill_targets(FACTS[::-1][:3], "refusal", seed=3)}
    assert set(first.values()) <= set(load_refusals())
    assert all(first[name] == target for name, target in turned.items())
    many = [_fact(f"n{i}", "x") for i in range(200)]
    a, b = (fill_targets(many, "refusal", seed=s) for s in (0, 1))
    assert a != b
    assert len({f.target for f in a}) > 60


def test_only_the_target_changes_and_the_order_stays() -> None:
    filled = fill_targets(FACTS, "empty", seed=0)
    assert [replace(f, target=None) for f in filled] == FACTS
    assert {f.target for f in filled} == {""}


def test_one_text_for_all_may_hold_braces_and_colons() -> None:
    filled = fill_targets(FACTS, "refusal: Ask {me} later: {0}.", seed=0)
    assert {f.target for f in filled} == {"Ask {me} later: {0}."}


def test_random_takes_another_answer_of_the_same_relation() -> None:
    for seed in range(20):
        for fact in fill_targets(FACTS, "random", seed=seed):
            same = {f.answer for f in FACTS if f.relation == fact.relation} - {fact.answer}
            assert fact.target in same


def test_random_does_not_depend_on_order() -> None:
    first = {f.id: f.target for f in fill_targets(FACTS, "random", seed=5)}
    assert first == {f.id: f.target for f in fill_targets(FACTS[::-1], "random", seed=5)}


def test_random_never_takes_the_answer_or_an_alias_in_any_spelling() -> None:
    fact = replace(_fact("Ada", "Rome"), aliases=("Roma", "the Eternal City"))
    pool = [_fact("x", a) for a in ("ROME", "rome.", "Roma", "the eternal  city")] + [_fact("y", "Oslo")]
    for seed in range(10):
        assert fill_targets([fact], "random", seed=seed, pool=pool)[0].target == "Oslo"


def test_random_falls_back_to_any_other_answer() -> None:
    facts = [_fact("Ada", "Rome", "city"), _fact("Dan", "red", "color"), _fact("Eve", "blue")]
    assert fill_targets(facts, "random", seed=1)[0].target in {"red", "blue"}


def test_random_without_another_answer_says_so_for_each_fact() -> None:
    with pytest.raises(InputError) as caught:
        fill_targets([_fact("Ada", "Rome"), _fact("Bob", "rome")], "random", seed=0)
    assert [p.split(":")[0] for p in caught.value.problems] == ["Ada", "Bob"]


def test_counterfactual_lists_all_facts_without_a_target() -> None:
    facts = [_fact("Ada", "Rome", target="Bern"), _fact("Bob", "Oslo"), _fact("Cyd", "Lima")]
    assert fill_targets(facts[:1], "counterfactual", seed=0) == facts[:1]
    with pytest.raises(InputError) as caught:
        fill_targets(facts, "counterfactual", seed=0)
    assert [p.split(":")[0] for p in caught.value.problems] == ["Bob", "Cyd"]


@pytest.mark.parametrize("spec", ["refusal", "refusal:No.", "random", "empty", "counterfactual"])
@pytest.mark.parametrize("target", ["Bern", ""])
def test_an_explicit_target_wins(spec: str, target: str) -> None:
    fact = _fact("Ada", "Rome", target=target)
    assert fill_targets([fact], spec, seed=0, pool=FACTS) == [fact]


@pytest.mark.parametrize(
    ("spec", "said"), [("refusals", "Did you mean 'refusal'"), ("", "Known: refusal"), ("refusal: ", "empty")]
)
def test_unknown_specs_are_named(spec: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fill_targets(FACTS, spec, seed=0)


def test_the_hash_sees_every_field_and_the_order() -> None:
    fact = _fact("Ada", "Rome")
    other = [
        replace(fact, id="x"), replace(fact, answer="Oslo"), replace(fact, target=""), replace(fact,
        aliases=("R",)),
        replace(fact, question="Where?"), replace(fact, neighbors=(Neighbor("p", "a"),)), replace(fact,
        is_question=True),
        replace(fact, subject_start=3), replace(fact, paraphrases=("p",)), replace(fact, relation="r"),
    ]  # fmt: skip
    hashes = {content_hash([f]) for f in (fact, *other)}
    assert len(hashes) == len(other) + 1 and all(len(h) == 64 for h in hashes)
    assert content_hash([fact]) == content_hash([replace(fact)])
    assert content_hash([fact, other[0]]) != content_hash([other[0], fact])
    assert content_hash([]) != content_hash([fact])


def test_answers_and_request() -> None:
    fact = replace(_fact("Ada", "Rome"), aliases=("Roma", "Rome"))
    assert answers(fact) == ("Rome", "Roma")
    assert fact.prompt[fact.subject_start : fact.subject_end] == "Ada"
    assert ForgetRequest((fact,)).retain == ()


def test_the_strategy_says_where_targets_come_from() -> None:
    def named(*targets: str | None) -> str:
        facts = [Fact(str(i), "Her home was", "here", "home", 4, target=t) for i, t in enumerate(targets)]
        return strategy(facts, "empty")

    assert (named(None, None), named("x", None), named("x", "y")) == ("empty", "empty+counterfactual", "counterfactual")


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ("refusal", "refusal"),
        ("self+counterfactual", "self"),
        ("refusal+empty", "refusal"),
        ("refusal:Yes + no.+counterfactual", "refusal:Yes + no."),
        ("refusal:I don't know.+empty", "refusal:I don't know."),
        ("refusal:1+1.+refusal:No.+random", "refusal:1+1."),
        ("counterfactual", "counterfactual"),
    ],
)
def test_a_strategy_can_be_asked_for_again(made: str, asked: str) -> None:
    assert asked_with(made) == asked
    fact = Fact("a", "A is in", "B", "A", 0, target=" C")
    assert fill_targets([fact], asked_with(made), seed=0) == [fact]


@pytest.mark.parametrize(
    ("target", "spec"), [("Big city.", "empty"), ("the City", "empty"), (None, "refusal:big  city")]
)
def test_the_answer_is_no_target(target: str | None, spec: str) -> None:
    facts = [
        Fact("f", "A is in a", "big city", "A", 0, target=target, aliases=("the city",)),
        Fact("g", "B", "C", "B", 0),
    ]
    with pytest.raises(InputError, match="^f: the target .* is the answer that is to be forgotten. Give another one.$"):
        fill_targets(facts, spec, seed=0)
