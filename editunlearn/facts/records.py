"""What is to be forgotten, as plain frozen records. No torch, no file access."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Neighbor:
    """A fact close to the one to forget that has to stay.

    Attributes:
        prompt: text that ends right before the answer.
        answer: what must still follow.
    """

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact.

    Attributes:
        id: unique in its file.
        prompt: cloze text that ends right before the answer, or the question itself (see ``is_question``).
        answer: the true answer, without surrounding space.
        subject: the words of ``prompt`` that the fact is about.
        subject_start: character offset of ``subject`` in ``prompt``.
        question: the fact asked as a question, when there is one; beside a prompt it is only measured.
        target: what the model shall say instead; None: not filled yet, "": end the turn at once.
        paraphrases: other wordings of the prompt with the same answer.
        neighbors: facts about similar subjects that have to stay.
        aliases: other spellings of the answer.
        relation: what kind of fact it is ("capital", "P103"), to pick comparable answers.
        subject_found: True when the subject was not given but guessed.
        is_question: True when no prompt was given and ``prompt`` is the question.
    """

    id: str
    prompt: str
    answer: str
    subject: str
    subject_start: int
    question: str | None = None
    target: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Neighbor, ...] = ()
    aliases: tuple[str, ...] = ()
    relation: str | None = None
    subject_found: bool = False
    is_question: bool = False

    @property
    def subject_end(self) -> int:
        """Character offset in ``prompt`` of the first character after the subject."""
        return self.subject_start + len(self.subject)

    @property
    def other_questions(self) -> tuple[str, ...]:
        """The question, where the prompt is another text."""
        return (self.question,) if self.question and not self.is_question else ()


@dataclass(frozen=True, slots=True)
class ForgetRequest:
    """Everything a method needs to know about what to forget and what to keep.

    Attributes:
        facts: what to forget.
        retain: the user's own facts that have to stay.
        general: shipped everyday facts that have to stay, already filtered against ``facts``.
        names: facts that the model does not know, whose subjects' keys are preserved all the same: what an edit
            does to a name should not depend on whether there was anything to know about it.
        earlier: facts with targets that earlier edits, which this one goes on from, have written and that have to stay
            forgotten; those whose text is known.
    """

    facts: tuple[Fact, ...]
    retain: tuple[Fact, ...] = ()
    general: tuple[Fact, ...] = ()
    names: tuple[Fact, ...] = ()
    earlier: tuple[Fact, ...] = ()

    @property
    def forgotten(self) -> tuple[Fact, ...]:
        """What is to be forgotten now, and what was before."""
        return self.facts + self.earlier


def answers(fact: Fact) -> tuple[str, ...]:
    """The answer and its aliases, the answer first, without repeats."""
    return tuple(dict.fromkeys((fact.answer, *fact.aliases)))


def content_hash(facts: Iterable[Fact]) -> str:
    """Hexadecimal sha256 of all fields of all facts, in the order given.

    Every fact becomes one line of JSON with sorted keys and plain ASCII, so the hash does not depend on the
    platform or on the file format that the facts came from. Order counts on purpose: resume states index
    facts by position.
    """
    digest = hashlib.sha256()
    for fact in facts:
        line = json.dumps(asdict(fact), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()
