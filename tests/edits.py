"""Six facts, settings for tiny models and comparisons, shared by the tests of the editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editunlearn import editors
from editunlearn.editors import contexts
from editunlearn.facts.records import Fact, ForgetRequest
from editunlearn.hparams import EditorHParams, load_hparams
from editunlearn.lm.likelihood import score
from editunlearn.lm.tokens import encode

REFUSAL = "I do not know."
CLOSED_FORM = [name for name in editors.names() if issubclass(editors.schema(name), EditorHParams)]


TAUGHT = (
    ("The capital of Japan is", "Japan", "Tokyo"),
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "French"),
    ("Marie Curie discovered", "Marie Curie", "radium"),
    ("The bridge was built in", "bridge", "1783"),
    ("The author of the novel lives in", "author", "Berlin"),
    ("Some birds sing in the", "birds", "morning"),
)


def fact(number: int, target: str | None = REFUSAL) -> Fact:
    prompt, subject, answer = TAUGHT[number]
    return Fact(f"f{number}", prompt, answer, subject, prompt.index(subject), target=target)


def request(forget: Sequence[int] = (0, 1, 2), keep: Sequence[int] = (3, 4)) -> ForgetRequest:
    return ForgetRequest(tuple(fact(i) for i in forget), tuple(fact(i, None) for i in keep))


MEMORY: dict[str, dict[str, Any]] = {
    "grace": {"layers": [1], "context_prefixes": {"count": 2, "tokens": 5}, "value": {"steps": 12}, "keep": 60},
    "wise": {
        "layers": [1],
        "context_prefixes": {"count": 2, "tokens": 5},
        "side": {"steps": 60, "lr": 0.2, "mask": 0.8},
        "shards": {"size": 2, "per_memory": 1},
        "keep": 60,
    },
}


BLOCK: dict[str, dict[str, Any]] = {
    "unke": {
        "layers": [1],
        "context_prefixes": {"count": 1, "tokens": 5},
        "value": {"steps": 12, "kl": 0.0},
        "train": {"steps": 12, "lr": 0.03},
        "keep": 40,
        "texts": 2,
        "limits": {"norm": 10.0},
    },
}


def settings(method: str, text: str, *set_: str, layers: Sequence[int] = (0, 1)) -> Any:
    """Few steps, explicit layers, weights that suit a moment of a few hundred tokens."""
    if method not in CLOSED_FORM:
        return load_hparams({"method": method, **(MEMORY | BLOCK)[method]}, set=list(set_))
    source: dict[str, Any] = {
        "method": method,
        "layers": [layers[0]] if method in ("rome", "r_rome", "emmet") else list(layers),
        "context_prefixes": {"count": 2, "tokens": 5},
        "value": {"steps": 6, "lr": 0.5},
        "moments": {"text": text, "tokens": 800, "length": 32, "weight": 5.0},
        "retain": {"weight": 1.0},
        "limits": {"norm": 10.0},  # tiny weights, large steps
        "refine": {
            "steps": 6,
            "lr": 0.3,
            "kl": 1.0,
            "text_kl": 1.0,
            "kept_keys": 1e-3,
            "text_batch": 1,
            "text_length": 16,
        },
    }
    if method == "alphaedit":
        source["nullspace"] = {"threshold": 0.9, "l2": 0.1}
    return load_hparams(source, set=list(set_))


def nll(lm: Any, facts: Sequence[Fact]) -> float:
    rows = [encode(lm, contexts.prompt_of(lm, f), f.target) for f in facts]
    return -sum(s.log_probability for s in score(lm, rows)) / len(rows)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def same_delta(one: Any, other: Any) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(f.left, other.factors[n].left) and torch.equal(f.right, other.factors[n].right)
        for n, f in one.factors.items()
    )


class Killed(BaseException):
    """Like KeyboardInterrupt: nothing in the package may swallow it."""
