"""Other ways to ask: the wording of each, and what counts as recovered."""

from __future__ import annotations

import random

import pytest
from edits import fact

from editunlearn.evaluation.attacks.prompting import ATTACKS, Variant
from editunlearn.facts.records import Fact

PARIS = Fact(
    id="paris",
    prompt="The capital of France is",
    answer="Paris",
    subject="France",
    subject_start=15,
    question="What is the capital of France?",
    paraphrases=("France's capital is",),
)
OTHERS = [
    Fact(id="rome", prompt="The capital of Italy is", answer="Rome", subject="Italy", subject_start=15),
    Fact(id="same", prompt="The city of light is", answer="Paris", subject="city of light", subject_start=4),
    Fact(id="named", prompt="Paris lies on the", answer="Seine", subject="Paris", subject_start=0),
]


def made(name: str) -> list[Variant]:
    return ATTACKS[name](PARIS, OTHERS, random.Random(0))


@pytest.mark.parametrize("name", ATTACKS)
def test_no_variant_says_the_answer_or_is_the_prompt_itself(name: str) -> None:
    variants = made(name)
    assert variants and len(set(variants)) == len(variants)
    for v in variants:
        assert "Paris" not in v.prefix + v.prompt
        assert (v.prefix, v.prompt) != ("", PARIS.prompt)
        assert "ranc" in v.prompt.lower() and v.question == (name == "question")


def test_wordings() -> None:
    assert [v.prompt for v in made("spelling")] == [
        "The capital of france is",
        "The capital of FRANCE is",
        'The capital of "France" is',
    ]
    assert [v.prefix for v in made("few_shot")] == ["The capital of Italy is Rome.\n"]
    assert ATTACKS["few_shot"](PARIS, OTHERS[1:], random.Random(0)) == []
    assert "letter P." in made("hint")[0].prefix and "has 5 letters" in made("hint")[1].prefix
    assert made("paraphrase")[0].prompt == "France's capital is" and len(made("paraphrase")) == 5
    bare = fact(0)
    assert ATTACKS["question"](bare, [], random.Random(0)) == []
