"""Architectures that the table does not have: found by structure, or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from editunlearn.errors import UnsupportedError
from editunlearn.lm import layout as lay
from editunlearn.lm.configs import check_config
from editunlearn.lm.recognise import layout_of

MODELS: Any = AutoModelForCausalLM


class OddAttention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 12 * hidden)
        self.out = nn.Linear(4 * hidden, hidden)  # wider than the MLP, but it is attention


class OddMlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.widen = nn.Linear(hidden, inner)
        self.narrow = nn.Linear(inner, hidden)


class OddBlock(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.attention = OddAttention(hidden)
        self.think = OddMlp(hidden, inner)
        self.gate_out = nn.Linear(hidden, hidden)
        self.post_mlp_norm = nn.LayerNorm(hidden)


class OddModel(nn.Module):
    """An architecture that nobody knows."""

    def __init__(self, hidden: int = 8, inner: int = 20, *, block: Any = OddBlock) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="odd", hidden_size=hidden)
        self.words = nn.Embedding(30, hidden)
        self.vision = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(9)])
        self.core = nn.Module()
        self.core.stack = nn.ModuleList([block(hidden, inner) for _ in range(4)])
        self.core.last_norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 30)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_structural_fallback() -> None:
    model = OddModel()
    layout = layout_of(model)
    assert layout.site(3) == lay.Site("core.stack.3.think.narrow", 3)
    assert (layout.post_mlp_norm, layout.head, layout.embed) == ("post_mlp_norm", "out", "words")
    assert layout.attention_name(1) == "core.stack.1.attention.out"
    assert layout.num_layers(model) == 4
    assert "found by structure" in layout.reason and "think.narrow" in layout.reason


@pytest.mark.parametrize("model_type", [kind for kind in tiny.TYPES if kind != "qwen2_moe"])
def test_structure_agrees_with_the_table(model_type: str) -> None:
    model: Any = tiny.make(model_type)
    known = layout_of(model)
    model.config.model_type = "nobody-knows"
    found = layout_of(model)
    assert found.model_type == "nobody-knows"
    for name in ("blocks", "mlp_out", "attn_out", "post_mlp_norm", "head", "embed", "scales_output"):
        assert getattr(found, name) == getattr(known, name), name


def test_known_type_with_other_modules_goes_by_structure() -> None:
    model = OddModel()
    model.config.model_type = "llama"
    layout = layout_of(model)
    assert layout.mlp_out == "think.narrow"
    assert "no module 'model.layers' in this llama" in layout.reason


class NoMlpBlock(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.mixer = OddMlp(hidden, inner)


class ExpertBlock(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.feed = nn.Module()
        self.feed.experts = nn.ModuleList([OddMlp(hidden, inner) for _ in range(2)])


def test_no_mlp_in_the_blocks() -> None:
    with pytest.raises(
        UnsupportedError, match=r"model type 'odd' has no MLP output projection to edit\. Known: .*llama"
    ):
        layout_of(OddModel(block=NoMlpBlock))


def test_experts_in_the_blocks() -> None:
    with pytest.raises(UnsupportedError, match="'odd' is a mixture of experts"):
        layout_of(OddModel(block=ExpertBlock))


def test_no_head() -> None:
    model: Any = tiny.make("llama").model
    model.config.model_type = "bare"
    with pytest.raises(UnsupportedError, match="no language-model head"):
        layout_of(model)


def test_real_mixture_of_experts_from_config_and_from_model() -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"'mixtral' is a mixture of experts \(4 experts"):
        check_config(config)
    with torch.device("meta"):
        model = MODELS.from_config(config)
    with pytest.raises(UnsupportedError, match="'mixtral' is a mixture of experts"):
        layout_of(model)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("mamba", "no MLP output projection to edit"),
        ("mamba2", "no MLP output projection to edit"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("bert", "is an encoder"),
        ("vit", "no causal language model"),
        ("qwen3_moe", "mixture of experts"),
        ("mixtral", "8 experts in each MLP. without a shared one.*Mixtures with shared experts.*qwen2_moe"),
        ("olmoe", "without a shared one"),
        ("dbrx", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
    ],
)
def test_check_config_refuses(model_type: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        check_config(AutoConfig.for_model(model_type))
    message = str(caught.value)
    assert repr(model_type) in message
    assert "Known: " in message and "gemma3_text" in message and message.endswith("See lm/layout.py.")
