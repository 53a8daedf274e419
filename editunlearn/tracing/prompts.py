"""Prompts as they are traced: their tokens, which of them the subject is, and the token that the answer begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.editors.contexts import prompt_of
from editunlearn.errors import InputError
from editunlearn.facts.readers import load_facts
from editunlearn.lm.likelihood import score
from editunlearn.lm.tokens import encode, encode_target, subject_tokens
from editunlearn.resources import shipped_path

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

FIRST, MIDDLE, LAST = "first subject token", "middle subject tokens", "last subject token"
NEXT, FURTHER, END = "first token after", "further tokens", "last token"
ROLES = (FIRST, MIDDLE, LAST, NEXT, FURTHER, END)
"""What a token is in a prompt, in reading order. Tokens before the subject see nothing of it and have no role."""
MOST_AT_ONCE = 64
"""Facts asked at a time while looking for some that the model knows."""


@dataclass(frozen=True)
class TracedPrompt:
    """One prompt to trace.

    Attributes:
        id: of the fact.
        ids: token ids of the prompt, special tokens included.
        subject: indices of the subject's tokens, adjacent and in order.
        answer: id of the first token of the answer.
    """

    id: str
    ids: tuple[int, ...]
    subject: tuple[int, ...]
    answer: int

    @property
    def tokens(self) -> range:
        """Indices of the tokens that corrupting the subject can change: from its first one on."""
        return range(self.subject[0], len(self.ids))

    def role(self, token: int) -> str:
        """One of ``ROLES``. A subject of one token has a last one only; a prompt that ends with it has no ``END``."""
        first, last = self.subject[0], self.subject[-1]
        if token <= last:
            return LAST if token == last else FIRST if token == first else MIDDLE
        if token == len(self.ids) - 1:
            return END
        return NEXT if token == last + 1 else FURTHER

    @property
    def key(self) -> str:
        """Hash of the tokens, for the name of what is kept of it."""
        return hashlib.sha256(repr((self.ids, self.subject, self.answer)).encode()).hexdigest()[:24]


def traced(lm: LM, fact: Fact) -> TracedPrompt:
    """The fact's bare prompt in the model's own format."""
    prompt = prompt_of(lm, fact)
    ids, inside = subject_tokens(lm, prompt)
    answer = encode_target(lm, prompt, ids, fact.answer)[0]
    return TracedPrompt(fact.id, tuple(ids), tuple(range(inside[0], inside[-1] + 1)), answer)


def known(lm: LM, facts: Sequence[Fact], count: int) -> tuple[list[Fact], int]:
    """The first ``count`` facts whose whole answer the model writes by greedy decoding, and how many were asked.

    Raises:
        InputError: it knows none of them.
    """
    found: list[Fact] = []
    asked = 0
    while asked < len(facts) and len(found) < count:
        some = facts[asked : asked + MOST_AT_ONCE]
        scores = score(lm, [encode(lm, prompt_of(lm, fact), fact.answer) for fact in some])
        for fact, scored in zip(some, scores, strict=True):
            asked += 1
            if scored.greedy:
                found.append(fact)
            if len(found) == count:
                break
    if not found:
        raise InputError(
            f"{lm.name} answers none of the {len(facts)} facts by greedy decoding, so that there is no knowledge to "
            "trace. Give --facts that it knows, worded as text that it completes."
        )
    return found, asked


def embedding_spread(lm: LM) -> float:
    """Standard deviation of the embeddings of subjects' tokens, the unit of the noise.

    Over all entries of the embeddings of the shipped facts' subjects, as the embedding module puts them out (Gemma
    scales there), so that it is a property of the model and not of the facts that are traced.
    """
    facts = load_facts(shipped_path("data", "general_facts.jsonl"))
    subjects = [f" {fact.subject}" for fact in facts]
    ids = sorted({i for row in lm.tokenizer(subjects, add_special_tokens=False)["input_ids"] for i in row})
    embed = lm.layout.module(lm.model, lm.layout.embed)
    with torch.no_grad():
        states: Tensor = embed(torch.tensor([ids], device=lm.device))
    return float(states.double().std())


def noise_for(prompt: TracedPrompt, samples: int, width: int, seed: int) -> Tensor:
    """Standard normal noise for the subject's embeddings, (samples, subject tokens, width) float32 on the CPU.

    Seeded by the prompt's own tokens: a fact gets the same noise alone and among others.
    """
    mixed = hashlib.sha256(f"{seed}:{prompt.key}".encode()).digest()[:8]
    draw = torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)
    return torch.randn(samples, len(prompt.subject), width, generator=draw)


def facts_to_trace(source: str | Path | None, data_root: Path | None = None) -> list[Fact]:
    """Facts of a source; the shipped everyday facts when none is given."""
    if source is None:
        return load_facts(shipped_path("data", "general_facts.jsonl"))
    return load_facts(source, data_root=data_root, conflicts="first")
