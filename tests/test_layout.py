"""Every known architecture, unknown ones by structure, and the refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm import layout as lay
from editunlearn.lm.hooks import on_output, stack

MODELS: Any = AutoModelForCausalLM
MIXTURES = ("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe")
MORE_TYPES = (
    "olmo", "olmo3", "granite", "stablelm", "starcoder2", "cohere", "cohere2", "smollm3", "glm", "glm4",
    "helium", "nemotron", "ministral", "exaone4", "arcee", "seed_oss", "apertus", "hunyuan_v1_dense",
    "ernie4_5", "codegen", "gpt_neo", "gpt_bigcode", "mpt", *MIXTURES,
)  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "codegen": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 88, "rotary_dim": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 88},
    "gpt_neo": {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4},
    **dict.fromkeys(
        MIXTURES,
        {
            "hidden_size": 32,
            "intermediate_size": 72,
            "moe_intermediate_size": 88,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "moe_layer_start_index": 1,
            "n_routed_experts": 4,
            "moe_num_experts": 4,
            "moe_k": 2,
            "n_shared_experts": 1,
            "moe_num_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


def any_model(model_type: str) -> Any:
    if model_type in tiny.TYPES:
        return tiny.make(model_type)
    common = {"vocab_size": tiny.VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    named: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if model_type in (
        "helium",
        "ministral",
        "hunyuan_v1_dense",
        "nemotron",
    ):  # where head_dim is not worked out
        named["head_dim"] = 8
    config = AutoConfig.for_model(model_type, **common, **NEEDED.get(model_type, named))
    config.initializer_range = 0.1
    torch.manual_seed(0)
    return MODELS.from_config(config, attn_implementation="eager").eval()


def observe(model: nn.Module, layout: lay.Layout, layer: int) -> dict[str, torch.Tensor]:
    """Input and output of the site, input and output of the block, for one short sequence."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Clones: Falcon adds the attention output to the MLP output in place.
            seen[f"{name}.in"] = (args[0] if args else kwargs["hidden_states"]).clone()
            seen[f"{name}.out"] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    names = {"site": layout.site(layer).name, "block": layout.block_name(layer)}
    beside = {"post": layout.post_norm_name(layer), "gate": layout.gate_name(layer)}
    names |= {key: name for key, name in beside.items() if name}
    handles = [lay.module(model, n).register_forward_hook(keep(k), with_kwargs=True) for k, n in names.items()]
    with torch.no_grad():
        model(torch.tensor([[0, 10, 11, 12, 13]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: value.reshape(-1, value.shape[-1]) for key, value in seen.items()}


@pytest.mark.parametrize("model_type", [*tiny.TYPES, *MORE_TYPES])
def test_known_type(model_type: str) -> None:
    model = any_model(model_type)
    layout = lay.layout_of(model)
    assert layout.model_type == model_type
    assert layout.reason.startswith("known model type")
    assert layout.num_layers(model) == 3
    for name in (layout.head, layout.embed, layout.block_name(2)):
        lay.module(model, name)
    assert lay.module(model, layout.head) is model.get_output_embeddings()
    assert lay.module(model, layout.embed) is model.get_input_embeddings()
    lay.check_config(model.config)

    # The site is the linear map, (out, in), between what goes into it and what comes out of it.
    site = layout.site(1)
    weight = lay.read_weight(model, site.name)
    seen = observe(model, layout, 1)
    assert tuple(weight.shape) == (seen["site.out"].shape[-1], seen["site.in"].shape[-1])
    bias = getattr(lay.module(model, site.name), "bias", None)
    expected = seen["site.in"] @ weight.T + (0 if bias is None else bias.detach())
    torch.testing.assert_close(seen["site.out"], expected, atol=1e-5, rtol=1e-5)
    assert weight.shape[0] == 32 and weight.shape[1] > 64


@pytest.mark.parametrize("model_type", [*tiny.TYPES, *MORE_TYPES])
def test_output_reaches_the_residual_stream_as_the_layout_says(model_type: str) -> None:
    """A change of the weight moves the block output by scale x change, unless a norm lies between."""
    model = any_model(model_type)
    layout = lay.layout_of(model)
    before = observe(model, layout, 1)
    weight = lay.read_weight(model, layout.site(1).name)
    change = 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weight += change  # a view: this edits the model
    after = observe(model, layout, 1)
    torch.testing.assert_close(after["site.in"], before["site.in"])
    moved = before["site.in"] @ change.T * layout.scales_output
    if layout.output_gate is not None:
        moved = moved * before["gate.out"].sigmoid()
    if layout.post_mlp_norm is None:
        torch.testing.assert_close(after["block.out"] - before["block.out"], moved, atol=1e-4, rtol=1e-4)
    else:
        through_norm = after["post.out"] - before["post.out"]
        torch.testing.assert_close(after["block.out"] - before["block.out"], through_norm, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(through_norm, moved, atol=1e-2)


@pytest.mark.parametrize("model_type", [*tiny.TYPES, *MORE_TYPES])
def test_tokens_see_each_other_through_attn_out_alone(model_type: str) -> None:
    model = any_model(model_type)
    layout = lay.layout_of(model)
    names = [layout.attention_name(layer) for layer in range(3)]
    one, other = torch.tensor([[0, 10, 11, 12]]), torch.tensor([[0, 40, 41, 12]])

    def apart() -> float:
        with torch.no_grad():
            return float((model(one).logits - model(other).logits)[0, -1].abs().max())

    assert apart() > 1e-3
    with stack([on_output(lay.module(model, str(name)), lambda _, out: torch.zeros_like(out)) for name in names]):
        assert apart() < 1e-6


def test_granite_scales_its_mlp_output() -> None:
    config = AutoConfig.for_model(
        "granite", hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, residual_multiplier=0.22,
    )  # fmt: skip
    assert lay.layout_of(MODELS.from_config(config)).scales_output == pytest.approx(0.22)


def test_gemma3_wrapper() -> None:
    text = tiny.config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 5, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = MODELS.from_config(config)
    lay.check_config(config)
    layout = lay.layout_of(model)
    assert layout.site(2).name == "model.language_model.layers.2.mlp.down_proj"
    assert layout.num_layers(model) == 3
    assert layout.post_mlp_norm == "post_feedforward_layernorm"


# --- by structure


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
    layout = lay.layout_of(model)
    assert layout.site(3) == lay.Site("core.stack.3.think.narrow", 3)
    assert (layout.post_mlp_norm, layout.head, layout.embed) == ("post_mlp_norm", "out", "words")
    assert layout.attention_name(1) == "core.stack.1.attention.out"
    assert layout.num_layers(model) == 4
    assert "found by structure" in layout.reason and "think.narrow" in layout.reason


@pytest.mark.parametrize("model_type", MIXTURES)
def test_blocks_of_a_mixture_that_are_dense(model_type: str) -> None:
    layout = lay.layout_of(any_model(model_type))
    assert layout.dense_layers == {0} and layout.shared_expert
    names = [site.name for site in layout.sites([0, 1, 2])]
    shared = [f"model.layers.{i}.mlp.shared_experts.down_proj" for i in (1, 2)]
    assert names == ["model.layers.0.mlp.down_proj", *shared]


def test_a_mixture_whose_blocks_are_not_all_mixtures() -> None:
    config = tiny.config("qwen2_moe")
    config.mlp_only_layers = [1]
    with torch.device("meta"):
        layout = lay.layout_of(MODELS.from_config(config))
    assert [site.name.removeprefix("model.layers.") for site in layout.sites([0, 1])] == [
        "0.mlp.shared_expert.down_proj",
        "1.mlp.down_proj",
    ]
    assert layout.gate_name(0) == "model.layers.0.mlp.shared_expert_gate" and layout.gate_name(1) is None


@pytest.mark.parametrize("model_type", [kind for kind in tiny.TYPES if kind != "qwen2_moe"])
def test_structure_agrees_with_the_table(model_type: str) -> None:
    model: Any = tiny.make(model_type)
    known = lay.layout_of(model)
    model.config.model_type = "nobody-knows"
    found = lay.layout_of(model)
    assert found.model_type == "nobody-knows"
    for name in ("blocks", "mlp_out", "attn_out", "post_mlp_norm", "head", "embed", "scales_output"):
        assert getattr(found, name) == getattr(known, name), name


def test_known_type_with_other_modules_goes_by_structure() -> None:
    model = OddModel()
    model.config.model_type = "llama"
    layout = lay.layout_of(model)
    assert layout.mlp_out == "think.narrow"
    assert "no module 'model.layers' in this llama" in layout.reason


# --- refusals


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
        lay.layout_of(OddModel(block=NoMlpBlock))


def test_experts_in_the_blocks() -> None:
    with pytest.raises(UnsupportedError, match="'odd' is a mixture of experts"):
        lay.layout_of(OddModel(block=ExpertBlock))


def test_no_head() -> None:
    model: Any = tiny.make("llama").model
    model.config.model_type = "bare"
    with pytest.raises(UnsupportedError, match="no language-model head"):
        lay.layout_of(model)


def test_real_mixture_of_experts_from_config_and_from_model() -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"'mixtral' is a mixture of experts \(4 experts"):
        lay.check_config(config)
    with torch.device("meta"):
        model = MODELS.from_config(config)
    with pytest.raises(UnsupportedError, match="'mixtral' is a mixture of experts"):
        lay.layout_of(model)


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
        lay.check_config(AutoConfig.for_model(model_type))
    message = str(caught.value)
    assert repr(model_type) in message
    assert "Known: " in message and "gemma3_text" in message and message.endswith("See lm/layout.py.")


def test_unknown_module() -> None:
    with pytest.raises(InputError, match="no module 'model.layers.9'"):
        lay.module(tiny.make("llama"), "model.layers.9")


# --- the `layers` field


@pytest.mark.parametrize(
    ("spec", "n_layers", "layers", "reason"),
    [
        ([3, 1], 4, [1, 3], "given, of 4 blocks"),
        ("auto", 18, [3], "auto: depth 0.17 of 18 blocks"),
        ([0.0, 0.5, 0.99], 10, [0, 5, 9], "depth 0, 0.5, 0.99 of 10 blocks"),
        ([1.0], 10, [9], "depth 1 of 10 blocks"),
        ([0.29], 100, [29], "depth 0.29 of 100 blocks"),
        ([0.1, 0.2, 0.3], 3, [0], "count once"),
        ([0, 0.5], 4, [0, 2], "depth"),
    ],
)
def test_resolve_layers(spec: Any, n_layers: int, layers: list[int], reason: str) -> None:
    found, why = lay.resolve_layers(spec, n_layers, [0.17])
    assert found == layers
    assert reason in why


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([4], "block 4 does not exist; there are blocks 0 to 3"),
        ([-1], "block -1 does not exist"),
        ([2, 2], "block 2 is given twice"),
        ([1.1], "depth 1.1 is not from 0.0 to 1.0"),
        ([float("nan")], "depth nan is not from"),
        ([True], "True is not a number"),
        (["x"], "'x' is not a number"),
        ([], "the list is empty"),
        ("all", "'all' is neither 'auto'"),
    ],
)
def test_resolve_layers_refuses(spec: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        lay.resolve_layers(spec, 4, [0.2])


def test_resolve_layers_reports_everything_at_once() -> None:
    with pytest.raises(InputError) as caught:
        lay.resolve_layers([9, 1.5, 1, 1], 4, [0.2])
    assert len(caught.value.problems) == 3
