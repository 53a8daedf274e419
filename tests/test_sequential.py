"""Requests in parts against one request: what is exact in the equations, and how far a model is from it."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import tiny
import torch
from edits import TAUGHT, fact, nll, relative, settings
from torch import Tensor

from editunlearn import editors
from editunlearn.editors.closed_form import SiteProblem
from editunlearn.editors.earlier import Earlier
from editunlearn.facts.records import ForgetRequest

IN, OUT = 24, 9
EXACT = 1e-8
"""Rounding, and the jitter of a Cholesky factor."""
NEAR = 0.5
"""How far dW of four requests may be from that of one, relative to it, on a tiny model without refine."""


def in_parts(method: str, hp: Any, keys: Tensor, wanted: Tensor, moment: Tensor, keep: Tensor, parts: int) -> Tensor:
    """dW (out, in): every part writes what is still missing at its keys, those of the earlier parts being past keys."""
    change = torch.zeros(OUT, IN, dtype=torch.float64)
    past = keys[:0]
    for k, z in zip(keys.chunk(parts), wanted.chunk(parts), strict=True):
        missing = z - k @ change.T
        left, right = editors.module(method).solve(SiteProblem(k, k, missing, moment, keep, past), hp)
        change, past = change + left @ right, torch.cat([past, k])
    return change


@pytest.mark.parametrize("parts", [2, 10])
@pytest.mark.parametrize("seed", range(4))
def test_parts_give_what_one_request_gives(seed: int, parts: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    mix, count = torch.eye(IN, dtype=torch.float64) + 0.1 * normal(IN, IN), 10
    keys, wanted, keep, text = normal(count, IN) @ mix, normal(count, OUT), normal(5, IN) @ mix, normal(90, IN) @ mix
    moment = text.T @ text / len(text)
    memit = settings("memit", "general", "moments.weight=30.0", "retain.weight=3.0")
    literal = reference.one_request(keys, wanted, 30 * moment + 3 * keep.T @ keep)
    found = in_parts("memit", memit, keys, wanted, moment, keep, parts)
    assert relative(found, literal) < EXACT
    for soft in ("false", "true"):
        alpha = settings("alphaedit", "general", f"nullspace.soft={soft}", "nullspace.threshold=0.4")
        whole = in_parts("alphaedit", alpha, keys, wanted, moment, keep, 1)
        assert relative(in_parts("alphaedit", alpha, keys, wanted, moment, keep, parts), whole) < EXACT


def one_after_another(lm: Any, hp: Any, parts: list[list[int]]) -> Earlier:
    """What is left of requests for a few facts each."""
    earlier = None
    for part in parts:
        asked = ForgetRequest(tuple(map(fact, part)), (fact(4, None), fact(5, None)))
        earlier = Earlier(*editors.run(lm, asked, hp, earlier=earlier))
    assert earlier is not None
    return earlier


@pytest.fixture(scope="module")
def taught() -> Any:
    return tiny.taught_lm([(prompt, answer) for prompt, _, answer in TAUGHT])


@pytest.fixture(scope="module")
def hp(text: str) -> Any:
    return settings("memit", text, "refine=null", "value.steps=25", "value.stop_loss=0.01", layers=(0,))


@pytest.fixture(scope="module")
def four(taught: Any, hp: Any) -> Earlier:
    return one_after_another(taught, hp, [[0], [1], [2], [3]])


def change(delta: Any) -> Tensor:
    (factors,) = delta.factors.values()
    return factors.left.double() @ factors.right.double()


def test_four_requests_on_a_model_are_nearly_one(taught: Any, hp: Any, four: Earlier) -> None:
    whole = one_after_another(taught, hp, [[0, 1, 2, 3]])
    assert relative(change(four.delta), change(whole.delta)) < NEAR
    facts = [fact(i) for i in range(4)]
    before = nll(taught, facts)
    losses = []
    for found in (four, whole):
        with found.delta.applied(taught):
            losses.append([nll(taught, [f]) for f in facts])
    print(relative(change(four.delta), change(whole.delta)), before, losses)
    assert max(map(max, losses)) < 0.5 * before
