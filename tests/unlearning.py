"""A tiny model that knows six facts, quick settings and measures, shared by the tests of the unlearners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import tiny
import torch
from edits import TAUGHT, request

from editunlearn import unlearners
from editunlearn.facts.records import Fact
from editunlearn.hparams import load_hparams
from editunlearn.lm.likelihood import score
from editunlearn.unlearners import rows

ASKED = request((0, 1, 2), (3, 4, 5))
FEW: dict[str, list[str]] = {
    "ga": ["train.epochs=3"],
    "ce_u": ["train.epochs=3"],
    "simnpo": ["weight=1"],
    "satimp": ["beta1=1", "retain.weight=0.05"],
    "altpo": ["alternatives=2", "tokens=4"],
    "memflex": ["magnitude=0.5"],
    "grin": ["fraction=0.3"],
    "sure": ["percentile=60"],
    "loku": ["train.lr=0.03"],
    "task_vector": ["train.lr=0.01", "train.epochs=3"],
    "rmu": ["train.lr=0.02"],
}
"""What a tiny model needs to forget in a few updates."""


@lru_cache(maxsize=4)
def _weights(kind: str) -> dict[str, torch.Tensor]:
    taught = tiny.taught_lm([(prompt, answer) for prompt, _, answer in TAUGHT], kind)
    return {name: tensor.clone() for name, tensor in taught.model.state_dict().items()}


def lm(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A model that knows the facts of ``edits``."""
    made = tiny.lm(kind, hidden=48, dtype=dtype)
    made.model.load_state_dict(_weights(kind))
    return made


def settings(method: str, *set_: str) -> Any:
    """Few epochs, large steps."""
    quick = ["train.epochs=8", "train.lr=0.01", "train.batch=2", *FEW.get(method, [])]
    return load_hparams({"method": method}, set=[*quick, *set_])


def probability(model: Any, facts: Sequence[Fact]) -> float:
    """Mean probability of the true answers."""
    found = score(model, [rows.answer_row(model, f) for f in facts], closed=False)
    return sum(math.exp(s.log_probability) for s in found) / len(found)


def same(one: Any, other: Any) -> bool:
    """Two deltas, bit for bit."""
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


NAMES = unlearners.names()
