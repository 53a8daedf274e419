"""Other answers in the model's own words, for AltPO (arXiv 2409.13474)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.facts.records import answers
from editunlearn.lm.generation import generate
from editunlearn.unlearners import rows
from editunlearn.unlearners.rows import Pool

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact, ForgetRequest
    from editunlearn.lm.loading import LM

TRIES = 4
"""Times that as many answers are sampled as are wanted; of what comes out, true ones are thrown away."""
CHOICES = 50
"""Tokens that sampling chooses from."""


def pool(lm: LM, request: ForgetRequest, each: int, tokens: int, seed: int) -> Pool:
    """``each`` rows for each fact, some of them repeated where the model has fewer other answers.

    Raises:
        InputError: for some fact the model gave nothing but the true answer.
    """
    facts, prompts = request.facts, [rows.prompt_of(lm, fact) for fact in request.facts]
    found: list[list[str]] = [[] for _ in facts]
    for number in range(TRIES * each):
        texts = generate(lm, prompts, max_new_tokens=tokens, top_k=CHOICES, seed=seed + 1000 * number)
        for own, fact, text in zip(found, facts, texts, strict=True):
            text = first_sentence(text)
            if text and text not in own and len(own) < each and not _true(fact, text):
                own.append(text)
        if all(len(own) == each for own in found):
            break
    none = [fact.id for fact, own in zip(facts, found, strict=True) if not own]
    if none:
        raise InputError(
            f"for {len(none)} facts the model has no other answer than the true one (first: {none[0]!r}). Use dpo "
            "with --targets random instead."
        )
    made = [
        rows.answer_row(lm, fact, own[i % len(own)])
        for fact, own in zip(facts, found, strict=True)
        for i in range(each)
    ]
    return Pool(made, each)


def first_sentence(text: str) -> str:
    """Up to the first line break or full stop."""
    return text.strip().partition("\n")[0].partition(". ")[0].strip()


def _true(fact: Fact, text: str) -> bool:
    return any(answer.casefold() in text.casefold() for answer in answers(fact))
