"""Pools of token rows that unlearners train on: what to forget, what to say instead, what to keep."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.facts.text import documents
from editunlearn.lm.tokens import Prompt, Row, encode, wrap
from editunlearn.lm.windows import windows

if TYPE_CHECKING:
    from torch import Tensor

    from editunlearn.facts.records import Fact, ForgetRequest
    from editunlearn.lm.loading import LM

TEXTS = 2000
"""Pieces of generic text that are made, at most."""


@dataclass(frozen=True)
class Pool:
    """Rows of one kind.

    Attributes:
        rows: token ids, each with the part at its end that is scored.
        each: so many rows after one another belong to one fact to forget; 0: they belong to none.
        labels: for each row what its scored tokens are to be instead of themselves, which the model still reads.
    """

    rows: Sequence[Row]
    each: int
    labels: Sequence[Tensor] | None = None


def prompt_of(lm: LM, fact: Fact) -> Prompt:
    """The fact's prompt in the model's own format."""
    return wrap(lm, fact.prompt, (fact.subject_start, fact.subject_end), question=fact.is_question)


def answer_row(lm: LM, fact: Fact, answer: str | None = None) -> Row:
    """Prompt and true answer, without a closing token: most statements go on behind their answer.

    Args:
        answer: another answer instead.
    """
    row = encode(lm, prompt_of(lm, fact), fact.answer if answer is None else answer, "prompt_last")
    return replace(row, ids=row.ids[:-1])


def refusal_row(lm: LM, fact: Fact) -> Row:
    """Prompt and target, closed by the token that ends a turn."""
    return encode(lm, prompt_of(lm, fact), fact.target, "prompt_last")


def whole(row: Row) -> Row:
    """The same row, scored from its second token on."""
    return Row(row.ids, 0, 1)


def forget(lm: LM, request: ForgetRequest) -> Pool:
    """True answers of the facts to forget.

    Raises:
        InputError: there are no facts.
    """
    if not request.facts:
        raise InputError("there are no facts to forget.")
    return Pool([answer_row(lm, fact) for fact in request.facts], 1)


def refusal(lm: LM, request: ForgetRequest) -> Pool:
    """What is to be said instead.

    Raises:
        InputError: a fact has no target.
    """
    missing = [f.id for f in request.facts if f.target is None]
    if missing:
        raise InputError(f"{len(missing)} facts have no target (first: {missing[0]!r}). Fill them with fill_targets.")
    return Pool([refusal_row(lm, fact) for fact in request.facts], 1)


def keep_facts(lm: LM, request: ForgetRequest) -> Pool:
    """True answers of the user's retain facts and of the shipped facts that the model knows.

    Raises:
        InputError: there are none.
    """
    kept = [*request.retain, *request.general]
    if not kept:
        raise InputError(
            "there are no facts to keep: none were given, and the model knows none of the shipped ones. Give some with "
            "--retain, or set retain.data=text."
        )
    return Pool([answer_row(lm, fact) for fact in kept], 0)


def keep_text(lm: LM, source: str, length: int) -> Pool:
    """Pieces of generic text, all tokens scored.

    Raises:
        InputError: the source cannot be read, or has no text.
    """
    found = [Row(tuple(p), 0, 1) for p in windows(lm, documents(source), length, TEXTS * length) if len(p) > 1]
    if not found:
        raise InputError(f"retain.text: {source!r} has no text in it.")
    return Pool(found, 0)


class Draw:
    """Seeded choice of rows; everything comes up once before anything comes twice.

    Args:
        pools: sizes of the pools that belong to no fact.
    """

    def __init__(self, facts: int, batch: int, pools: Mapping[str, int], seed: int) -> None:
        self.facts, self.batch, self.pools = facts, batch, pools
        self.random = random.Random(seed)
        self.waiting: dict[str, list[int]] = {}

    @property
    def updates(self) -> int:
        """Batches of an epoch."""
        return -(-self.facts // self.batch)

    def epoch(self) -> list[list[int]]:
        """Numbers of the facts of each batch, of sizes that differ by one at most."""
        order = list(range(self.facts))
        self.random.shuffle(order)
        return [order[i :: self.updates] for i in range(self.updates)]

    def numbers(self, pool: str, count: int) -> list[int]:
        """The next rows of a pool that belongs to no fact, at least one."""
        queue, size = self.waiting.setdefault(pool, []), self.pools[pool]
        count = max(1, min(count, size))
        while len(queue) < count:
            fresh = list(range(size))
            self.random.shuffle(fresh)
            queue.extend(fresh)
        taken, self.waiting[pool] = queue[:count], queue[count:]
        return taken

    def one_of(self, each: int, facts: Sequence[int]) -> list[int]:
        """One of each fact's ``each`` rows in a pool."""
        return [number * each + (self.random.randrange(each) if each > 1 else 0) for number in facts]
