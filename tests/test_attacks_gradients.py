"""Gradient norms: as autograd finds them, and the model is left as it was."""

from __future__ import annotations

import delta_samples as samples
import pytest
import tiny
import torch

from editunlearn.evaluation.attacks.gradients import gradient_norms
from editunlearn.lm.tokens import Row

ROWS = [Row((2, 5, 9, 40, 41), 1, 3), Row((2, 6, 7), 1, 1)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])  # the last two tie embedding and head
def test_norms_equal_autograds(kind: str) -> None:
    lm = tiny.lm(kind)
    flags = [p.requires_grad for p in lm.model.parameters()]
    parameters = [p.requires_grad_(True) for p in lm.model.parameters()]
    wanted = []
    for row in ROWS:
        log_p = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        own = [log_p[i - 1, row.ids[i]] for i in range(row.prompt_length, len(row.ids))]
        found = torch.autograd.grad(-torch.stack(own).mean(), parameters)
        wanted.append(sum(float(g.norm()) for g in found) / len(found))
    for p, flag in zip(parameters, flags, strict=True):
        p.requires_grad_(flag)
    before, seen = samples.snapshot(lm.model), list[int]()
    with torch.no_grad():
        assert gradient_norms(lm, ROWS, seen.append) == pytest.approx(wanted, rel=1e-4)
    assert seen == [1, 1] and [p.requires_grad for p in lm.model.parameters()] == flags
    assert all(p.grad is None for p in lm.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(samples.snapshot(lm.model).values(), before.values(), strict=True))


def test_an_edit_is_part_of_the_model() -> None:
    lm = tiny.lm("llama")
    plain = gradient_norms(lm, ROWS)
    with samples.delta(lm, scale=0.5).applied(lm):
        assert gradient_norms(lm, ROWS) != plain
    assert gradient_norms(lm, ROWS) == plain
