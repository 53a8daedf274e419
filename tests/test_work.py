"""Counted work against the literal way of the public implementations: a guard that does not depend on the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from edits import relative, request, settings
from torch.utils.flop_counter import FlopCounterMode

from editunlearn.console import Console
from editunlearn.editors import contexts, moments, values
from editunlearn.lm.hooks import frozen

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import literal

LAYERS = (2, 3)


def counted(run: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        found = run()
    return int(counter.get_total_flops()), found


def model() -> Any:
    """Six blocks and a vocabulary that is large beside them, as in real models."""
    return tiny.lm("llama", layers=6, vocab_size=2000)


@pytest.mark.parametrize("facts", [1, 4])
def test_values(text: str, facts: int) -> None:
    lm = model()
    hp = settings("memit", text, "value.spread=residual", "value.kl=0.1", "value.kl_on=subject", layers=LAYERS)
    v = hp.value.model_copy(
        update={"steps": 12, "stop_loss": 0.0, "scale": "absolute", "penalty": "norm", "lr": 0.05, "weight_decay": 0.5}
    )
    asked = request(tuple(range(facts)))
    rows = contexts.forget_rows(lm, asked.facts, ["The house is old. ", "Some of them. "], hp)
    problems = contexts.problems(lm, asked.facts, rows, [], hp)
    block = lm.layout.block_name(LAYERS[-1])
    with frozen(lm.model):
        slow, theirs = counted(
            lambda: [
                literal.value(lm, p.rows, p.pinned, block, steps=12, lr=0.05, clamp=v.clamp, decay=0.5, kl=0.1)
                for p in problems
            ]
        )
        fast, ours = counted(lambda: values.optimise(lm, problems, [block], v))
    assert relative(ours.change[:, 0], torch.stack([change for _, change, _ in theirs])) < 1e-3
    assert slow > 5 * fast, (slow, fast)


def test_statistics(text: str) -> None:
    lm = model()
    hp = settings("memit", text).moments
    sites = lm.layout.sites((1, 2, 3))
    pieces = moments.pieces(lm, sites, hp)
    slow, theirs = counted(lambda: literal.statistics(lm, [s.name for s in sites], pieces))
    fast, ours = counted(lambda: moments.get(lm, sites, hp, None, Console(quiet=True)))
    assert all(relative(one.moment, theirs[name]) < 1e-5 for name, one in ours.items())
    assert slow > 1.5 * fast, (slow, fast)
