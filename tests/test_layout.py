"""Every architecture of the table."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from editunlearn.errors import InputError
from editunlearn.lm import layout as lay
from editunlearn.lm.configs import check_config
from editunlearn.lm.hooks import on_output, stack
from editunlearn.lm.recognise import layout_of

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
    layout = layout_of(model)
    assert layout.model_type == model_type
    assert layout.reason.startswith("known model type")
    assert layout.num_layers(model) == 3
    for name in (layout.head, layout.embed, layout.block_name(2)):
        lay.module(model, name)
    assert lay.module(model, layout.head) is model.get_output_embeddings()
    assert lay.module(model, layout.embed) is model.get_input_embeddings()
    check_config(model.config)

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
    layout = layout_of(model)
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
    layout = layout_of(model)
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
    assert layout_of(MODELS.from_config(config)).scales_output == pytest.approx(0.22)


def test_gemma3_wrapper() -> None:
    text = tiny.config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 5, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = MODELS.from_config(config)
    check_config(config)
    layout = layout_of(model)
    assert layout.site(2).name == "model.language_model.layers.2.mlp.down_proj"
    assert layout.num_layers(model) == 3
    assert layout.post_mlp_norm == "post_feedforward_layernorm"


@pytest.mark.parametrize("model_type", MIXTURES)
def test_blocks_of_a_mixture_that_are_dense(model_type: str) -> None:
    layout = layout_of(any_model(model_type))
    assert layout.dense_layers == {0} and layout.shared_expert
    names = [site.name for site in layout.sites([0, 1, 2])]
    shared = [f"model.layers.{i}.mlp.shared_experts.down_proj" for i in (1, 2)]
    assert names == ["model.layers.0.mlp.down_proj", *shared]


def test_a_mixture_whose_blocks_are_not_all_mixtures() -> None:
    config = tiny.config("qwen2_moe")
    config.mlp_only_layers = [1]
    with torch.device("meta"):
        layout = layout_of(MODELS.from_config(config))
    assert [site.name.removeprefix("model.layers.") for site in layout.sites([0, 1])] == [
        "0.mlp.shared_expert.down_proj",
        "1.mlp.down_proj",
    ]
    assert layout.gate_name(0) == "model.layers.0.mlp.shared_expert_gate" and layout.gate_name(1) is None


def test_unknown_module() -> None:
    with pytest.raises(InputError, match="no module 'model.layers.9'"):
        lay.module(tiny.make("llama"), "model.layers.9")
