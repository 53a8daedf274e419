"""Long targets in chunks, each with a key and a value of its own (AnyEdit, arXiv 2502.05628).

One value can make a model say a sentence, hardly a page. So the target is cut into windows of tokens, and what follows
is written at the token before each, where the model has just said the chunk before. The first chunk is written where a
short target would be (as published at the prompt's last token: ``subject_token: prompt_last``), so that a target of one
chunk is edited as it is without this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from editunlearn.editors.contexts import ForgetRows, prompt_alone
from editunlearn.editors.value_types import Problem, Standing, Values
from editunlearn.lm.tokens import Row

if TYPE_CHECKING:
    from editunlearn.hparams import Chunks


@dataclass(frozen=True)
class Parts:
    """What gets a column of the edit: whole facts, or the chunks of their targets, those of one fact in order.

    Attributes:
        owner: of each part the number of its fact.
        turn: of each part how many parts of its fact come before it.
        others: for each fact its bare prompt and target, and the tokens of it where nothing is written; empty if they
            are not to be preserved.
        preserve: how often each of those counts.
    """

    owner: tuple[int, ...]
    turn: tuple[int, ...]
    others: tuple[tuple[Row, tuple[int, ...]], ...] = ()
    preserve: float = 0.0


def whole(owner: Sequence[int]) -> Parts:
    """Every fact is a part, in each spelling."""
    return Parts(tuple(owner), (0,) * len(owner))


def split(rows: ForgetRows, hp: Chunks | None) -> tuple[ForgetRows, Parts]:
    """The rows of all parts, and whose they are."""
    if hp is None:
        return rows, whole(rows.owner)
    cut = [_cut(targets, hp.size) for targets in rows.targets]
    owner = tuple(fact for fact, pieces in zip(rows.owner, cut, strict=True) for _ in pieces)
    turn = tuple(number for pieces in cut for number in range(len(pieces)))
    parts = [piece for pieces in cut for piece in pieces]
    keys = [prompt_alone(row) for part in parts for row in part]
    others = tuple(
        (targets[0], _elsewhere(targets[0], pieces)) for targets, pieces in zip(rows.targets, cut, strict=True)
    )
    return ForgetRows(keys, parts, owner), Parts(owner, turn, others if hp.preserve > 0 else (), hp.preserve)


def _cut(targets: Sequence[Row], size: int) -> list[list[Row]]:
    """For each chunk the rows of one fact, one a context: what comes before it as the prompt, then the chunk."""
    # a context may change how a target is tokenised: the last chunk takes what is left of it
    count = max(1, -(-min(len(row.ids) - row.prompt_length for row in targets) // size))
    return [[_chunk(row, number, size, last=number == count - 1) for row in targets] for number in range(count)]


def _chunk(row: Row, number: int, size: int, *, last: bool) -> Row:
    start = row.prompt_length + number * size
    end = len(row.ids) if last else start + size
    return Row(row.ids[:end], start - 1 if number else row.lookup, start)


def _elsewhere(row: Row, pieces: Sequence[Sequence[Row]]) -> tuple[int, ...]:
    """Tokens of the bare prompt and its target that nothing is written at."""
    written = {piece[0].lookup for piece in pieces}
    return tuple(token for token in range(len(row.ids)) if token not in written)


def in_turn(problems: Sequence[Problem], parts: Parts, optimise: Callable[[list[Problem], int], Values]) -> Values:
    """Values of all parts: of the first chunks of all facts, of the second with those at work, and so on.

    Args:
        optimise: (problems, number of the turn) -> their values.
    """
    found: dict[int, Values] = {}
    for turn in range(max(parts.turn) + 1):
        chosen = [part for part, own in enumerate(parts.turn) if own == turn]
        values = optimise([_behind(problems, part, turn, found, parts) for part in chosen], turn)
        found |= {part: values.at(place) for place, part in enumerate(chosen)}
    return Values.of([found[part] for part in range(len(problems))])


def _behind(problems: Sequence[Problem], part: int, turn: int, found: dict[int, Values], parts: Parts) -> Problem:
    """The problem of a part with the changes of the earlier chunks of its fact."""
    problem, earlier = problems[part], range(part - turn, part)
    if turn == 0:
        return problem
    tokens = zip(*([row.lookup for row in problems[number].rows] for number in earlier), strict=True)
    standing = Standing(tuple(tokens), torch.stack([found[number].change for number in earlier]))
    # no prompt ends in the middle of an answer, so that there is nothing to pin
    name = f"chunk {turn + 1} of fact number {parts.owner[part] + 1}"
    return replace(problem, pinned=(), standing=standing, name=name)
