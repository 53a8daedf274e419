"""A few prompts with answers, as rows of token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from editunlearn.lm.head import Head, hidden_of
from editunlearn.lm.tokens import Batch, Prompt, Row, encode

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


def target_logits(lm: Any, padded: Batch) -> Tensor:
    """Logits that predict the target tokens, (number of them, vocabulary), in the order of the batch's labels."""
    states = hidden_of(lm, padded.targets, lambda: lm.model(**padded.inputs, use_cache=False))
    return torch.cat([piece.clone() for piece in Head(lm).logits(states)])
