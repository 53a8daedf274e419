"""Other ways to ask: the wording of each, and what counts as recovered."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import tiny
from edits import fact

from editunlearn.evaluation.attacks.back_phrasing import cloze
from editunlearn.evaluation.attacks.prompting import ATTACKS, Variant
from editunlearn.evaluation.attacks.splitting import Split, split_subject
from editunlearn.evaluation.suites import facts
from editunlearn.facts.records import Fact
from editunlearn.lm.tokens import encode, encode_prompt, wrap

PARIS = Fact(
    id="paris",
    prompt="The capital of France is",
    answer="Paris",
    subject="France",
    subject_start=15,
    question="What is the name of France's capital?",
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
        assert (v.prefix, v.prompt, v.split) != ("", PARIS.prompt, None)
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


@pytest.mark.parametrize(
    ("question", "subject", "text"),
    [
        ("What is Danielle Darrieux's mother tongue?", "Danielle Darrieux", "Danielle Darrieux's mother tongue is"),
        ("what was the capital of France ?", "France", "The capital of France was"),
        ("What is Ana Petrova known for?", "Ana Petrova", "Ana Petrova is known for"),
        ("Where was Ana Petrova born?", "Ana Petrova", "Ana Petrova was born in"),
        ("Where is the Eiffel Tower?", "Eiffel Tower", "The Eiffel Tower is in"),
        ("When did Marie Curie marry?", "Marie Curie", "Marie Curie married in"),
        ("Where does Ana Petrova teach?", "Ana Petrova", "Ana Petrova teaches in"),
        ("In which country was Ana Petrova born?", "Ana Petrova", "Ana Petrova was born in the country of"),
        ("Which city is the Kremlin in?", "Kremlin", "The Kremlin is in the city of"),
        ("What language does Ana Petrova speak?", "Ana Petrova", "The language that Ana Petrova speaks is"),
        ("Which band did Freddie Mercury sing in?", "Freddie Mercury", "The band that Freddie Mercury sang in is"),
        ("Which company makes the Corolla?", "Corolla", "The company that makes the Corolla is"),
        ("Who wrote the Odyssey?", "Odyssey", "The Odyssey was written by"),
        ("Who painted the Mona Lisa?", "Mona Lisa", "The Mona Lisa was painted by"),
        ("Who is the author of Hamlet?", "Hamlet", "The author of Hamlet is"),
        ("Who sings Bohemian Rhapsody?", "Bohemian Rhapsody", None),
        ("Why did Rome fall?", "Rome", None),
        ("Where did she live with Ana Petrova?", "Ana Petrova", None),
    ],
)
def test_questions_become_texts_to_be_continued(question: str, subject: str, text: str | None) -> None:
    assert cloze(question, subject) == text


def test_back_phrasing_is_another_way_and_gives_nothing_away() -> None:
    def variants(**more: object) -> list[Variant]:
        return ATTACKS["back_phrasing"](replace(PARIS, **more), [], random.Random(0))  # type: ignore[arg-type]

    assert variants() == [Variant("", "The name of France's capital is")]
    assert variants(question="What is the capital of France?") == []  # that is its prompt
    assert variants(question="What is Paris the capital of?", subject="Paris", answer="Paris") == []
    asked = "What is the capital of France?"
    assert variants(prompt=asked, question=asked, is_question=True) == [Variant("", PARIS.prompt)]


def test_a_question_that_was_turned_into_a_text_is_continued() -> None:
    fact = replace(PARIS, prompt=PARIS.question, subject_start=24, question=PARIS.question, is_question=True)  # type: ignore[arg-type]
    asked = {part.name: part.probes for part in facts.parts(tiny.lm("llama"), facts.Request([fact], attacks=True))}
    own, turned = asked["forget"][0].prompt, asked["attack_back_phrasing"][0].prompt
    assert own is not None and own.text == "Question: What is the name of France's capital?\nAnswer:"
    assert turned is not None and turned.text == "The name of France's capital is"
    assert len({probe.prompt for probe in asked["attack_tokenisation"]}) == len(asked["attack_tokenisation"]) > 0


@pytest.mark.parametrize("chat", [False, True])
def test_the_same_text_in_other_tokens(chat: bool) -> None:
    lm = tiny.lm("llama", chat=chat)
    text = "The mother tongue of Danielle Darrieux is"
    prompt = wrap(lm, text, (21, 38), question=chat)
    usual = encode_prompt(lm, prompt, "prompt_last")[0]
    ways = [Split(True, 0), Split(False, 7), Split(False, 7)]
    found = [split_subject(lm, prompt, way) for way in ways]
    ids = [p.ids for p in found if p is not None and p.ids is not None]
    assert len(ids) == 3 and ids[1] == ids[2] != ids[0]
    for own in ids:
        assert len(own) > len(usual) and lm.tokenizer.decode(own) == lm.tokenizer.decode(usual)
        assert own[:4] == tuple(usual[:4])  # what stands before the subject is as it was
    letters = [lm.tokenizer.decode([i]) for i in ids[0]]
    first = next(i for i, letter in enumerate(letters) if letter == "D")
    assert letters[first : first + 17] == list("Danielle Darrieux")
    assert found[0] is not None and encode(lm, found[0], None, "prompt_last").ids == ids[0]
    with pytest.raises(ValueError, match="the tokens of .* are given"):
        encode(lm, found[0], None, "last")


def test_a_subject_of_single_bytes_cannot_be_split() -> None:
    lm = tiny.lm("llama")
    assert split_subject(lm, wrap(lm, "X is", (0, 1), question=False), Split(True, 0)) is None
    assert split_subject(lm, wrap(lm, "数学 is", (0, 2), question=False), Split(False, 0)) is None
