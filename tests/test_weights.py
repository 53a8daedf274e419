"""Weights of linear maps: orientation, quantisation, and what has no matrix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import pytorch_utils

from editunlearn.errors import UnsupportedError
from editunlearn.lm import layout as lay

CONV1D: Any = pytorch_utils.Conv1D


@pytest.mark.parametrize(("inside", "outside"), [(6, 4), (5, 5)])
@pytest.mark.parametrize("transposed", [True, False])
def test_orientation_by_type_not_by_shape(inside: int, outside: int, transposed: bool) -> None:
    model = nn.Module()
    model.proj = CONV1D(outside, inside) if transposed else nn.Linear(inside, outside)
    weight = lay.read_weight(model, "proj")
    assert weight.shape == (outside, inside)
    assert lay.is_transposed(model, "proj") is transposed
    x = torch.randn(3, inside)
    torch.testing.assert_close(model.proj(x), x @ weight.T + model.proj.bias.detach())
    assert weight.data_ptr() == model.proj.weight.data_ptr()
    weight[1, 2] = 7.0
    assert model.proj.weight[(2, 1) if transposed else (1, 2)].item() == 7.0
    assert not weight.requires_grad


class Linear4bit(nn.Linear):
    """The class name is what tells."""


class Linear8bitLt(nn.Linear):
    pass


class GptqLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bits = 4
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))


def quantised(kind: str) -> nn.Module:
    if kind == "nf4":
        child: nn.Module = Linear4bit(4, 4)
        child.weight.quant_state = SimpleNamespace(quant_type="nf4")  # type: ignore[union-attr]
        return child
    if kind == "fp8":
        child = nn.Linear(4, 4)
        child.weight = nn.Parameter(child.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        return child
    return {"int8": lambda: Linear8bitLt(4, 4), "gptq": GptqLinear}[kind]()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nf4", "4-bit (nf4)"),
        ("int8", "8-bit (int8)"),
        ("gptq", "4-bit (GptqLinear)"),
        ("fp8", "8-bit (float8_e4m3fn)"),
    ],
)
def test_quantised_weights_are_named_and_refused(kind: str, words: str) -> None:
    model = nn.Module()
    model.proj = quantised(kind)
    assert lay.quantisation(model, "proj") == words
    with pytest.raises(UnsupportedError) as caught:
        lay.read_weight(model, "proj")
    assert str(caught.value) == (
        f"proj is {words}; merging would round the edit away. Use --save lora, or load in bfloat16."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_weights_are_not_quantised(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.proj = nn.Linear(4, 4).to(dtype)
    assert lay.quantisation(model, "proj") is None


def test_a_norm_has_no_matrix() -> None:
    with pytest.raises(UnsupportedError, match="model.norm"):
        lay.read_weight(tiny.make("llama"), "model.norm")
