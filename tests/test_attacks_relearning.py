"""Relearning: it learns, on any architecture, on top of an edit, and leaves the model as it was."""

from __future__ import annotations

import delta_samples as samples
import pytest
import tiny
import torch

from editunlearn.errors import InputError, NumericalError
from editunlearn.evaluation.attacks.relearning import Relearn, relearned
from editunlearn.lm.likelihood import score
from editunlearn.lm.tokens import Row

ROWS = [Row((2, 5 + i, 9, 40 + i, 41 + i), 1, 3) for i in range(6)]


@pytest.mark.parametrize("kind", samples.TYPES)
@pytest.mark.parametrize("what", ["full", "lora"])
def test_it_learns_and_leaves_nothing(kind: str, what: str) -> None:
    lm = tiny.lm(kind)
    before, plain = samples.snapshot(lm.model), samples.logits(lm.model)
    flags = [p.requires_grad for p in lm.model.parameters()]
    hp = Relearn(steps=30, lr=0.01 if what == "full" else 0.03, what=what)  # type: ignore[arg-type]
    base = sum(s.log_probability for s in score(lm, ROWS, closed=False))
    with relearned(lm, ROWS, hp) as losses:
        assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]
        assert sum(s.log_probability for s in score(lm, ROWS, closed=False)) > 0.7 * base
        found = samples.logits(lm.model)
        assert not torch.equal(found, plain)
    assert torch.equal(samples.logits(lm.model), plain)
    assert all(torch.equal(a, b) for a, b in zip(samples.snapshot(lm.model).values(), before.values(), strict=True))
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert all(p.grad is None for p in lm.model.parameters())
    with relearned(lm, ROWS, hp) as again:
        assert again == losses and torch.equal(samples.logits(lm.model), found)


def test_it_starts_from_the_edited_model() -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm, scale=0.5)
    with relearned(lm, ROWS, Relearn(steps=1)) as plain:
        pass
    with delta.applied(lm), relearned(lm, ROWS, Relearn(steps=1)) as edited:
        pass
    assert plain != edited


def test_what_cannot_be() -> None:
    lm = tiny.lm("llama")
    for rows, steps in (([], 1), ([Row((1, 2), 1, 2)], 1), (ROWS, 0)):
        with pytest.raises(InputError, match="at least one of each"), relearned(lm, rows, Relearn(steps=steps)):
            pass
    with pytest.raises(NumericalError, match="not finite"), relearned(lm, ROWS, Relearn(steps=20, lr=1e30)):
        pass
