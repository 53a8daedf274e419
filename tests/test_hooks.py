"""Reading and changing what flows through a model, and logits at chosen positions only."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from lm_rows import rows, target_logits
from torch import Tensor, nn

from editunlearn.lm.head import logits_of
from editunlearn.lm.hooks import (
    StopForward,
    contiguous_input,
    first_tensor,
    on_input,
    on_output,
    read_inputs,
    run_truncated,
)
from editunlearn.lm.tokens import batch


class Odd(nn.Module):
    """Two steps, the first with another kind of output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Identity(), nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.second.weight)
        self.ran = 0

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = {"tensor": x, "tuple": (x, "cache"), "list": [x, "cache"]}[self.kind]
        out = self.first(kept)
        assert type(out) is type(kept)
        assert self.kind == "tensor" or out[1] == "cache"
        self.ran += 1
        return self.second(input=out if self.kind == "tensor" else out[0])


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list"])
def test_hooks_see_and_replace_hidden_states_in_any_container(kind: str) -> None:
    model, seen = Odd(kind), []
    x = torch.ones(2, 3)
    with on_output(model.first, lambda i, o: o + 1), on_input(model.second, seen.append):
        assert torch.equal(model(x), x + 1)  # the second gets its input by keyword
    with on_output(model.first, lambda i, o: seen.append(o)):
        assert torch.equal(model(x), x)
    assert torch.equal(seen[0], x + 1) and torch.equal(seen[1], x)
    assert not model.first._forward_hooks and not model.second._forward_pre_hooks
    with pytest.raises(TypeError, match="expected a tensor"):
        first_tensor({"x": x})


def test_hooks_are_removed_after_an_exception() -> None:
    model = Odd("tensor")

    def fail(*_: Tensor) -> None:
        raise StopForward

    for context in (on_output(model.first, fail), on_input(model.first, fail)):
        with pytest.raises(StopForward), context:
            model(torch.ones(1, 3))
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_a_truncated_pass_stops_at_the_input() -> None:
    model = Odd("tensor")
    run_truncated(model, model.first, x=torch.ones(1, 3))
    assert model.ran == 0
    with pytest.raises(RuntimeError, match="never reached"):
        run_truncated(model, nn.Linear(1, 1), x=torch.ones(1, 3))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_read_inputs_of_several_sites(kind: str) -> None:
    lm = tiny.lm(kind)
    modules = [lm.layout.module(lm.model, s.name) for s in lm.layout.sites([0, 1])]
    later: list[Tensor] = []
    padded = batch(rows(lm), lm.pad_id)
    with on_input(lm.layout.module(lm.model, lm.layout.site(2).name), later.append):
        seen = read_inputs(lm.model, modules, padded.inputs)
        assert len(seen) == 2 and not later and not seen[0].requires_grad
    full: list[Tensor] = []
    with on_input(modules[1], full.append), torch.no_grad():
        lm.model(**padded.inputs)
    assert torch.equal(seen[1], full[0])


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("left", [False, True])
def test_scored_positions_equal_slices_of_the_full_logits(kind: str, left: bool) -> None:
    lm = tiny.lm(kind)
    padded = batch(rows(lm), lm.pad_id, left=left)
    with torch.no_grad():
        full = lm.model(**padded.inputs, use_cache=False).logits
        some = target_logits(lm, padded)
    assert torch.allclose(some, full[padded.targets], atol=1e-4)
    assert not lm.head._forward_pre_hooks


def test_a_contiguous_input_changes_nothing() -> None:
    lm = tiny.lm("gemma3_text")
    padded = batch(rows(lm), lm.pad_id)
    with torch.no_grad():
        before = lm.model(**padded.inputs, logits_to_keep=1).logits
        contiguous: list[bool] = []
        with contiguous_input(lm.head), on_input(lm.head, lambda x: contiguous.append(x.is_contiguous())):
            after = lm.model(**padded.inputs, logits_to_keep=1).logits
    assert contiguous == [True] and torch.equal(before, after)


@pytest.mark.parametrize("kind", tiny.TYPES)
def test_logits_of_hidden_states_are_the_models(kind: str) -> None:
    lm = tiny.lm(kind)
    padded, hidden = batch(rows(lm), lm.pad_id), []
    with torch.no_grad(), on_input(lm.head, lambda x: hidden.append(x)):
        full = lm.model(**padded.inputs, use_cache=False).logits
    with torch.no_grad():
        some = logits_of(lm, hidden[0][padded.targets])
    assert torch.allclose(some, full[padded.targets], atol=1e-5)
    if kind == "gemma2":  # with its soft cap, which these logits are large enough to show
        lm.model.config.final_logit_softcapping = 0.5
        with torch.no_grad():
            capped = logits_of(lm, hidden[0][padded.targets])
        assert torch.allclose(capped, 0.5 * torch.tanh(torch.atanh(full[padded.targets] / 30) * 30 / 0.5), atol=1e-4)
        assert float(capped.abs().max()) <= 0.5 < float(some.abs().max())
