"""The `layers` field of the hyperparameters."""

from __future__ import annotations

from typing import Any

import pytest

from editunlearn.errors import InputError
from editunlearn.lm.layers import resolve_layers


@pytest.mark.parametrize(
    ("spec", "n_layers", "layers", "reason"),
    [
        ([3, 1], 4, [1, 3], "given, of 4 blocks"),
        ("auto", 18, [3], "auto: depth 0.17 of 18 blocks"),
        ([0.0, 0.5, 0.99], 10, [0, 5, 9], "depth 0, 0.5, 0.99 of 10 blocks"),
        ([1.0], 10, [9], "depth 1 of 10 blocks"),
        ([0.29], 100, [29], "depth 0.29 of 100 blocks"),
        ([0.1, 0.2, 0.3], 3, [0], "count once"),
        ([0, 0.5], 4, [0, 2], "depth"),
    ],
)
def test_resolve_layers(spec: Any, n_layers: int, layers: list[int], reason: str) -> None:
    found, why = resolve_layers(spec, n_layers, [0.17])
    assert found == layers
    assert reason in why


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([4], "block 4 does not exist; there are blocks 0 to 3"),
        ([-1], "block -1 does not exist"),
        ([2, 2], "block 2 is given twice"),
        ([1.1], "depth 1.1 is not from 0.0 to 1.0"),
        ([float("nan")], "depth nan is not from"),
        ([True], "True is not a number"),
        (["x"], "'x' is not a number"),
        ([], "the list is empty"),
        ("all", "'all' is neither 'auto'"),
    ],
)
def test_resolve_layers_refuses(spec: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve_layers(spec, 4, [0.2])


def test_resolve_layers_reports_everything_at_once() -> None:
    with pytest.raises(InputError) as caught:
        resolve_layers([9, 1.5, 1, 1], 4, [0.2])
    assert len(caught.value.problems) == 3
