"""Losses: values and gradients against plain torch, in pieces of any size."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor

from editunlearn.numerics import losses


def logits(dtype: torch.dtype, n: int = 9, vocabulary: int = 50, seed: int = 0) -> Tensor:
    made = 3 * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_(True)


LABELS = torch.tensor([0, 3, 49, 7, 7, 12, 1, 30, 8])
UPSTREAM = torch.linspace(0.5, 2.0, 9)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    monkeypatch.setattr(losses, "ROW_ELEMENTS", rows * 50)
    ours, theirs = logits(dtype), logits(dtype)
    loss = losses.cross_entropy(ours, LABELS)
    wide = torch.nn.functional.cross_entropy(theirs.double(), LABELS, reduction="none")
    assert loss.dtype == torch.float32 and torch.allclose(loss.double(), wide, atol=1e-5)
    assert torch.allclose(loss.double(), reference.cross_entropy(theirs.detach(), LABELS), atol=1e-5)
    (loss * UPSTREAM).sum().backward()
    (wide * UPSTREAM).sum().backward()
    assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
    assert torch.allclose(ours.grad.double(), theirs.grad.double(), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kl(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    monkeypatch.setattr(losses, "ROW_ELEMENTS", rows * 50)
    base, ours, theirs = logits(dtype, seed=1), logits(dtype), logits(dtype)
    loss = losses.kl(base, ours)
    wide = torch.nn.functional.kl_div(
        theirs.double().log_softmax(-1), base.detach().double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert loss.dtype == torch.float32 and torch.allclose(loss.double(), wide, atol=1e-5)
    assert torch.allclose(loss.double(), reference.kl(base.detach(), theirs.detach()), atol=1e-5)
    (loss * UPSTREAM).sum().backward()
    (wide * UPSTREAM).sum().backward()
    assert base.grad is None and ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad.double(), theirs.grad.double(), atol=TOLERANCE[dtype])
    assert float(losses.kl(base, base.detach()).abs().max()) < 1e-6


def test_losses_of_a_confident_model() -> None:
    """Impossible labels count as e^-60, their gradient is the true one; words that are masked out do no harm."""
    ours = torch.tensor([[0.0, -500.0, -torch.inf], [0.0, 1.0, -torch.inf]], requires_grad=True)
    loss = losses.cross_entropy(ours, torch.tensor([1, 0]))
    assert torch.allclose(loss, torch.tensor([-losses.FLOOR, 1.3132617]))
    loss.sum().backward()
    assert ours.grad is not None and torch.allclose(ours.grad[0], torch.tensor([1.0, -1.0, 0.0]), atol=1e-6)
    divergence = losses.kl(ours.detach(), torch.zeros(2, 3, requires_grad=True))
    assert torch.allclose(divergence, torch.tensor([1.0986123, 0.5164]), atol=1e-3)
    assert torch.isnan(losses.cross_entropy(torch.full((1, 3), torch.nan), torch.tensor([0]))).all()


def test_losses_without_gradient_keep_none() -> None:
    with torch.no_grad():
        assert not losses.cross_entropy(logits(torch.float32), LABELS).requires_grad
    assert not losses.kl(logits(torch.float32).detach(), logits(torch.float32).detach()).requires_grad


def test_mean_by() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], requires_grad=True)
    means = losses.mean_by(values, torch.tensor([0, 2, 2, 0]), 4)
    assert means.tolist() == [5.0, 0.0, 3.0, 0.0]  # a group of nothing adds nothing
    means[2].backward()
    assert values.grad is not None and values.grad.tolist() == [0.0, 0.5, 0.5, 0.0]
