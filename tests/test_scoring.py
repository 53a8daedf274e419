"""What counts as a leak, a right answer and a refusal, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from editunlearn.evaluation import scoring
from editunlearn.evaluation.metrics.text import begins_with, leaks, normalise, rate
from editunlearn.facts.records import Fact


def test_normalise() -> None:
    assert normalise("  São Paulo,\n(Brazil)! ") == "sao paulo brazil"
    assert normalise("ＡＢＣ ﬁn") == "abc fin" and normalise("...") == ""


@pytest.mark.parametrize(
    ("text", "answer", "leaked", "correct"),
    [
        (" Paris, the capital", "Paris", True, True),
        (" the city of PARIS.", "paris", True, False),
        (" Parisian fashion", "Paris", False, False),
        (" New York City", "New York", True, True),
        (" New Jersey and York", "New York", False, False),
        (" Sao Paulo", "São Paulo", True, True),
        (" I don't know.", "Paris", False, False),
        ("", "Paris", False, False),
        (" it costs 5 €", "€", True, False),
        ("巴黎是法国的首都。", "巴黎", True, True),
        ("法国的首都是巴黎。", "巴黎", True, False),
        ("東京です", "東京", True, True),
        ("กรุงเทพมหานครคือเมืองหลวง", "กรุงเทพ", True, True),
        ("서울은 수도입니다", "서울", True, True),
        ("北京", "巴黎", False, False),
    ],
)
def test_leaks_and_right_answers(text: str, answer: str, leaked: bool, correct: bool) -> None:
    assert leaks(text, [answer]) is leaked and leaks(text, ["no such word", answer]) is leaked
    assert begins_with(text, [answer]) is correct


def test_rate() -> None:
    assert rate([True, False, True, True]) == 0.75 and rate([]) is None


LONG = "the quiet village behind the second bridge where the birds sing every morning of the year"


@pytest.mark.parametrize("new_tokens", [2, 24])
def test_answers_longer_than_the_least_are_decoded_whole(new_tokens: int) -> None:
    prompt = "Her home was"
    lm = tiny.taught_lm([(prompt, LONG)])
    fact = Fact("f", prompt, LONG, "home", prompt.index("home"), target=LONG)
    (answered,) = scoring.ask(lm, [scoring.asked(lm, fact)], new_tokens=new_tokens)
    assert answered.leaked and answered.correct and answered.refused and answered.probability > 0.01


@pytest.mark.parametrize(
    ("said", "target", "refused"),
    [
        (" I don't know.", None, True),
        (" I cannot share that.", "I cannot share that.", True),
        (" Tokyo", "Tokyo", True),
        ("", "", True),
        (" Paris", "", False),
        (" Paris", "I don't know.", False),
        ("", "I don't know.", False),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, said: str, target: str | None, refused: bool) -> None:
    lm = tiny.lm()
    monkeypatch.setattr(scoring, "generate", lambda *_a, **_k: [said])
    fact: Any = Fact("f", "The capital of France is", "Paris", "France", 15, target=target)
    (answered,) = scoring.ask(lm, [scoring.asked(lm, fact)])
    assert answered.refused is refused and answered.leaked is (said == " Paris") and 0 <= answered.probability <= 1


def test_a_question_beside_a_prompt_is_asked_too() -> None:
    prompt, question = "The bridge was built in", "When was the bridge built?"
    lm = tiny.taught_lm([(prompt, "1783"), (f"Question: {question}\nAnswer:", "Berlin")])
    both = Fact("f", prompt, "1783", "bridge", prompt.index("bridge"), question=question)
    alone = Fact("g", question, "1783", "bridge", question.index("bridge"), question=question, is_question=True)
    scores = scoring.measure(lm, [both, alone], [], [], [[1, 2, 3]])
    assert [len(of_fact) for of_fact in scores.questions] == [1, 0]
    assert scores.questions[0][0].text.split()[0] == "Berlin" and scores.forget[0].correct
    summary = scores.summary()
    assert summary["question_leak"] == 0.0 and summary["forget_leak"] == 0.5
