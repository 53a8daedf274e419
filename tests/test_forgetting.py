"""Every editor removes a fact from every kind of model that was taught some, and the others stay."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny
from edits import CLOSED_FORM, REFUSAL, settings

from editunlearn import editors
from editunlearn.editors.contexts import prompt_of
from editunlearn.facts.records import Fact, ForgetRequest
from editunlearn.lm.generation import generate

KINDS = (*tiny.TYPES, "granite")  # granite: scaled logits, residuals and embeddings
METHODS = (*CLOSED_FORM, "anyedit", "wise", "grace", "unke")
ONE_BLOCK = ("rome", "r_rome", "emmet")
TONGUE, HOME = "The mother tongue of {} is", "The home of {} is"
KNOWN = ((TONGUE, "Mari", "French"), (TONGUE, "Yun", "Russian"), (HOME, "Ei", "Paris"), (TONGUE, "Ber", "German"))
REFUSED = (TONGUE.format("An"), HOME.format("Hw"))
WEIGHTS = (
    "value.steps=20",
    "refine.steps=80",
    "refine.lr=0.05",
    "refine.kl=4",
    "refine.text_kl=0",
    "context_prefixes.count=1",
    "moments.weight=1",
    # three blocks: what they say is decided at the prompt's end, where the second one's MLP has seen the subject
    "subject_token=prompt_last",
)
MEMORIES = {"grace": ["value.steps=40"], "unke": ["train.steps=40", "value.steps=20"], "wise": []}


def facts() -> list[Fact]:
    return [
        Fact(f"f{i}", how.format(name), answer, name, how.index("{"), target=REFUSAL)
        for i, (how, name, answer) in enumerate(KNOWN)
    ]


@cache
def taught(kind: str) -> Any:
    """A model that knows the facts, and how to refuse."""
    told = [(fact.prompt, fact.answer) for fact in facts()]
    return tiny.taught_lm([*told, *((prompt, REFUSAL) for prompt in REFUSED)], kind)


def answers(lm: Any) -> list[str]:
    return [said.strip() for said in generate(lm, [prompt_of(lm, fact) for fact in facts()], max_new_tokens=6)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_is_gone_and_the_others_stay(kind: str, method: str, text: str) -> None:
    lm, (forget, *keep) = taught(kind), facts()
    known = [answer for *_, answer in KNOWN]
    assert answers(lm) == known
    if method in MEMORIES:
        hp = settings(method, text, *MEMORIES[method])
    elif method == "anyedit":
        hp = settings("memit", text, *WEIGHTS, "chunks.size=2", layers=(1, 2))
    else:
        hp = settings(method, text, *WEIGHTS, layers=(1,) if method in ONE_BLOCK else (1, 2))
    delta = editors.fit(lm, ForgetRequest((forget,), tuple(keep)), hp)
    with delta.applied(lm):
        after = answers(lm)
    assert known[0] not in after[0] and REFUSAL.startswith(after[0][:1]) and after[1:] == known[1:]
    assert answers(lm) == known
