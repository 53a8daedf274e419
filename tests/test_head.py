"""Losses through the head in pieces are those of the whole logits, and so are their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from editunlearn.lm import head as heads
from editunlearn.lm.head import Head, before_head, logits_of

LABELS = torch.tensor([3, 0, 7, 5, 3])


def states(lm: Any, rows: int, seed: int) -> Tensor:
    width = lm.head.weight.shape[1]
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(lm.dtype)


def plainly(lm: Any, hidden: Tensor, base: Tensor) -> Tensor:
    log_q = logits_of(lm, hidden).double().log_softmax(-1)
    log_p = logits_of(lm, base).double().log_softmax(-1)
    nll = -log_q[: len(LABELS)].gather(1, LABELS[:, None])[:, 0]
    return torch.cat([nll, (log_p.exp() * (log_p - log_q[len(LABELS) :])).sum(-1)])


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("rows", [1, 3, 6, 100])
def test_losses_and_gradients_are_those_of_the_whole_logits(kind: str, rows: int) -> None:
    lm = tiny.lm(kind)
    lm.model.requires_grad_(False)
    head = Head(lm)
    head.rows = rows
    weight = torch.rand(8, generator=torch.Generator().manual_seed(2))
    found = []
    for loss_of in (head.losses, None):
        hidden, base = states(lm, 8, 0).requires_grad_(), states(lm, 3, 1)
        loss = loss_of(hidden, LABELS, base) if loss_of else plainly(lm, hidden, base)
        (weight.to(loss) * loss).sum().backward()
        assert hidden.grad is not None
        found.append((loss.detach(), hidden.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=1e-4, rtol=1e-3)
    hidden = states(lm, 8, 0)
    assert not head.losses(hidden, LABELS, states(lm, 3, 1)).requires_grad
    torch.testing.assert_close(head.kl(hidden, hidden), torch.zeros(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_the_likeliest_token_of_each_state(kind: str) -> None:
    lm = tiny.lm(kind)
    head, hidden = Head(lm), states(lm, 5, 0)
    head.rows = 2
    assert torch.equal(head.likeliest(hidden), logits_of(lm, hidden).argmax(-1))


def test_what_a_model_does_to_its_logits_is_not_left_out() -> None:
    assert Head(tiny.lm("llama")).plain and Head(tiny.lm("gemma3_text")).plain
    assert not Head(tiny.lm("gemma2")).plain  # soft cap
    assert not Head(tiny.lm("gptj")).plain  # bias


def test_the_head_is_left_out_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")
    ids = torch.tensor([[1, 2, 3]])
    before = lm.model(ids).logits
    scored = torch.tensor([[False, True, True]])
    with before_head(lm.head, scored) as seen:
        assert lm.model(ids).logits.shape == (1, 1, 1)
    torch.testing.assert_close(logits_of(lm, seen[0]), before[0, 1:])
    assert torch.equal(lm.model(ids).logits, before)
    with pytest.raises(RuntimeError), before_head(lm.head, scored):
        raise RuntimeError
    assert torch.equal(lm.model(ids).logits, before)
    monkeypatch.setattr(heads, "PIECE", 1)
    assert Head(lm).rows == 1
