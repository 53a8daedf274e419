"""Facts asked as the questions that they bring along: what a chat model is asked by its users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from editunlearn.facts.records import Fact
from editunlearn.facts.subjects import find_subject


def as_question(fact: Fact) -> Fact:
    """The fact with its question as the prompt, and its former prompt as one more wording; others as they are.

    The subject is the same words where they stand in the question, else it is looked for.
    """
    if fact.question is None or fact.is_question:
        return fact
    start, found = fact.question.rfind(fact.subject), False
    subject = fact.subject
    if start < 0:
        span = find_subject(fact.question, fact.answer)
        start, subject, found = span.start, fact.question[span.start : span.end], True
    return replace(
        fact,
        prompt=fact.question,
        subject=subject,
        subject_start=start,
        subject_found=found or fact.subject_found,
        paraphrases=(*fact.paraphrases, fact.prompt),
        is_question=True,
    )


def as_questions(facts: Sequence[Fact]) -> tuple[list[Fact], str]:
    """Every fact as its question where it has one, and a line that says how many have none."""
    found = [as_question(fact) for fact in facts]
    without = [fact.id for fact in found if not fact.is_question]
    if not without:
        return found, ""
    shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
    return found, f"{len(without)} of {len(found)} facts have no question and stay statements to complete: {shown}"
