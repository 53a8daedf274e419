"""Quantisation: rounding the weights of an edited model can round the edit away (arXiv 2410.16454)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.console import Console
from editunlearn.deltas.arithmetic import merged_weight
from editunlearn.deltas.kinds import written
from editunlearn.errors import InputError
from editunlearn.lm import weights
from editunlearn.lm.weights import read_weight
from editunlearn.naming import did_you_mean
from editunlearn.numerics.quantise import nf4, round_to_nearest

if TYPE_CHECKING:
    from editunlearn.deltas.kinds import Delta
    from editunlearn.lm.loading import LM

GROUP = 64
"""Weights that share a scale at 4 bits, or the largest part of it that divides a row."""


def _group(weight: Tensor) -> int:
    return math.gcd(weight.shape[1], GROUP)


def _to_bfloat16(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).to(weight.dtype)


SCHEMES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "bf16": _to_bfloat16,
        "int8": partial(round_to_nearest, bits=8),
        "int4": lambda weight: round_to_nearest(weight, 4, _group(weight)),
        "nf4": lambda weight: nf4(weight, _group(weight)),
    }
)
"""By name, how a weight (out, in) is rounded. Embeddings and the output head stay as they are, as in bitsandbytes."""


@contextmanager
def quantised(lm: LM, scheme: str, delta: Delta | None = None, console: Console | None = None) -> Iterator[None]:
    """The model with ``delta`` merged and the linear maps of its blocks rounded; restored bit-exactly at the end.

    Raises:
        InputError: an unknown scheme.
        UnsupportedError: the model is quantised already, or the delta changes no weights.
    """
    if scheme not in SCHEMES:
        hint = did_you_mean(scheme, SCHEMES)
        raise InputError(f"unknown quantisation {scheme!r}.{hint} Schemes: {', '.join(SCHEMES)}.")
    changes = written(delta, f"rounding to {scheme}").factors if delta is not None else {}
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        bar = (console or Console(quiet=True)).progress(linear_maps(lm), f"rounding to {scheme}")
        with torch.no_grad(), bar as names:
            for name in names:
                weight = read_weight(lm.model, name)
                kept.append((weight, weight.clone()))
                merged = weight
                if name in changes:
                    merged = merged_weight(weight, changes[name].left, changes[name].right)
                weight.copy_(SCHEMES[scheme](merged))
        yield
    finally:
        with torch.no_grad():
            for weight, old in kept:
                weight.copy_(old)


def linear_maps(lm: LM) -> list[str]:
    """Names of the linear maps of all blocks."""
    return weights.linear_maps(lm.model, lm.layout.blocks)
