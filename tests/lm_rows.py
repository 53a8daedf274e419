"""A few prompts with answers, as rows of token ids."""

from __future__ import annotations

from typing import Any

from editunlearn.lm.tokens import Prompt, Row, encode

TEXTS = (
    ("The capital of Japan is", "Japan", "Tokyo"),
    ("Marie Curie discovered", "Marie Curie", "radium and polonium."),
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "French"),
    ("He", "He", "is a civil engineer."),
)


def plain(text: str, subject: str) -> Prompt:
    start = text.index(subject)
    return Prompt(text, (start, start + len(subject)))


def rows(lm: Any, target: bool = True) -> list[Row]:
    return [encode(lm, plain(text, subject), answer if target else None) for text, subject, answer in TEXTS]


def prompts(lm: Any) -> list[Prompt]:
    return [plain(text, subject) for text, subject, _ in TEXTS]
