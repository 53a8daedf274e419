"""What rows share at their beginning is found, and running it once changes nothing."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import tiny
import torch
from edits import relative

from editunlearn.lm.beginnings import Beginnings, shared
from editunlearn.lm.hooks import on_input, stack
from editunlearn.lm.resume import Tail, Whole
from editunlearn.lm.tokens import Row

CONTEXTS = ([0, 5, 6, 7, 8], [0, 5, 6, 9, 10, 11], [0])


def rows(facts: int = 4) -> list[Row]:
    """Each fact in each context: its own tokens, a subject that ends at the lookup token, a target."""
    found = []
    for fact, context in itertools.product(range(facts), CONTEXTS):
        ids = (*context, *range(20 + 7 * fact, 22 + 7 * fact + fact % 2), 90 + fact, 3, 4)
        found.append(Row(ids, len(ids) - 3, len(ids) - 2))
    return found


def cost(given: list[tuple[int, ...]], lengths: list[int]) -> int:
    """Tokens that are run: each distinct beginning once, and what is left of each row."""
    heads = {row[:n] for row, n in zip(given, lengths, strict=True) if n}
    return sum(map(len, heads)) + sum(len(row) - n for row, n in zip(given, lengths, strict=True))


def test_hardly_more_tokens_than_must_be() -> None:
    draw = random.Random(0)
    better = 0
    for _ in range(200):
        given = [tuple(draw.choice((1, 2)) for _ in range(draw.randint(0, 4))) for _ in range(draw.randint(1, 5))]
        lengths = shared(given)
        assert all(0 <= n <= len(row) for row, n in zip(given, lengths, strict=True))
        choices = itertools.product(*(range(len(row) + 1) for row in given))
        least = min(cost(given, list(choice)) for choice in choices)
        total = sum(map(len, given))
        if any(lengths):
            assert cost(given, lengths) <= least + 1  # single rows are not put together with those of another branch
            better += 1
        else:
            assert total - least < max(1, 0.2 * total) or total == 0
    assert better > 50


def test_prefixes_are_found() -> None:
    begun = Beginnings.find([row.ids[: row.lookup + 1] for row in rows()], 2, torch.device("cpu"))
    assert begun.padded is not None and len(begun.padded.input_ids) == 2 and begun.width == 6
    assert begun.lengths == [5, 6, 0] * 4
    assert begun.mask(torch.device("cpu")).sum(1).tolist() == begun.lengths


def test_the_last_token_stays_with_its_row() -> None:
    same = [(0, 5, 6)] * 3
    assert Beginnings.find(same, 2, torch.device("cpu")).lengths == [2, 2, 2]
    assert Beginnings.find([(0,)] * 3, 2, torch.device("cpu")).padded is None


@pytest.mark.parametrize("kind", tiny.TYPES)
def test_running_them_once_changes_nothing(kind: str) -> None:
    lm: Any = tiny.lm(kind)
    given = [*rows(), Row((50, 51, 52, 53, 54), 2, 3)]  # the last begins like no other
    whole, lone, tail = Whole(lm, given), Tail.of(lm, given, 1, share=False), Tail.of(lm, given, 1)
    with torch.no_grad():
        wanted = whole.hidden(whole.padded.targets)
        for way in (lone, tail):
            assert relative(way.hidden(way.padded.targets), wanted) < 1e-4
            some = way.pick([12, 1])
            assert relative(some.hidden(some.padded.targets), wanted[[-2, -1, 2, 3]]) < 1e-4
    sizes: list[int] = []
    with stack(
        [on_input(lm.layout.module(lm.model, lm.layout.site(0).name), lambda x: sizes.append(x[..., 0].numel()))]
    ):
        Tail.of(lm, given, 1)
        Tail.of(lm, given, 1, share=False)
    assert sizes[0] + sizes[1] < 0.8 * sizes[2]
