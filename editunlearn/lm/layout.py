"""Where a model keeps its MLP output projections: the only table of module names in this package.

A *site* is the last linear map of a block's MLP (``down_proj``, ``c_proj``, ``fc2``, ...): the weight that
editors change. Elsewhere the talk is of sites and (out, in) matrices; only here (and in ``weights``) it is
known that GPT-2 stores the transpose, and that Gemma has a second norm behind its MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from editunlearn.lm.weights import is_transposed, module, quantisation, read_weight

__all__ = [
    "Layout",
    "Site",
    "is_transposed",
    "known_types",
    "mixtures",
    "module",
    "quantisation",
    "read_weight",
    "see_known",
    "table_row",
]


@dataclass(frozen=True)
class Site:
    """One editable weight: the full module name and the block that it sits in (0 is the first)."""

    name: str
    layer: int


@dataclass(frozen=True)
class Layout:
    """Module names of one model, and what happens to the MLP output before it reaches the residual stream.

    ``mlp_out``, ``dense_out``, ``attn_out``, ``output_gate`` and ``post_mlp_norm`` are relative to a block,
    all other names to the model; None where the model has no such module.

    Attributes:
        attn_out: last linear map of a block's attention. Nothing edits it; tracing reads and restores its output.
        post_mlp_norm: norm that the MLP output passes before it is added to the residual stream.
        dense_out, dense_layers: of a mixture of experts, the same projection in the blocks whose MLP is a plain one.
        output_gate: linear map whose sigmoid, one number a token, scales the MLP output (shared expert of Qwen2-MoE).
        shared_expert: ``mlp_out`` is that of an expert that all tokens pass; the routed ones beside it are left alone.
        scales_output: factor on the MLP output when it is added to the residual stream (Granite).
        reason: how the names were found.
    """

    model_type: str
    blocks: str = "model.layers"
    mlp_out: str = "mlp.down_proj"
    dense_out: str | None = None
    dense_layers: frozenset[int] = frozenset()
    output_gate: str | None = None
    shared_expert: bool = False
    attn_out: str | None = "self_attn.o_proj"
    post_mlp_norm: str | None = None
    head: str = "lm_head"
    embed: str = "model.embed_tokens"
    scales_output: float = 1.0
    reason: str = "known model type"

    def block_name(self, layer: int) -> str:
        """Full name of a block, e.g. ``model.layers.3``."""
        return f"{self.blocks}.{layer}"

    def layer_of(self, name: str) -> int:
        """Number of the block that a module is, or is in."""
        return int(name.removeprefix(f"{self.blocks}.").split(".")[0])

    def site(self, layer: int) -> Site:
        """The MLP output projection of a block. The number is not checked here: see ``resolve_layers``."""
        out = self.dense_out if layer in self.dense_layers else self.mlp_out
        return Site(f"{self.block_name(layer)}.{out}", layer)

    def sites(self, layers: Sequence[int]) -> list[Site]:
        """The MLP output projections of several blocks, in the given order."""
        return [self.site(layer) for layer in layers]

    def gate_name(self, layer: int) -> str | None:
        """Full name of the map whose sigmoid scales the MLP output; None where nothing does."""
        if self.output_gate is None or layer in self.dense_layers:
            return None
        return f"{self.block_name(layer)}.{self.output_gate}"

    def attention_name(self, layer: int) -> str | None:
        """Full name of the output projection of a block's attention; None where it is not known."""
        return None if self.attn_out is None else f"{self.block_name(layer)}.{self.attn_out}"

    def post_norm_name(self, layer: int) -> str | None:
        """Full name of the norm between the MLP output and the residual stream; None where there is none."""
        return None if self.post_mlp_norm is None else f"{self.block_name(layer)}.{self.post_mlp_norm}"

    def num_layers(self, model: nn.Module) -> int:
        """Number of blocks of the model."""
        return len(module(model, self.blocks))  # type: ignore[arg-type]

    # The functions of this module, so that callers need to carry only ``lm.layout``.
    def module(self, model: nn.Module, name: str) -> nn.Module:
        """See ``layout.module``."""
        return module(model, name)

    def read_weight(self, model: nn.Module, name: str) -> Tensor:
        """See ``layout.read_weight``."""
        return read_weight(model, name)

    def is_transposed(self, model: nn.Module, name: str) -> bool:
        """See ``layout.is_transposed``."""
        return is_transposed(model, name)


# model.layers.N.mlp.down_proj, lm_head
_LLAMA_LIKE = """
    apertus arcee cohere cohere2 diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 granite
    granite_swa helium hunyuan_v1_dense internlm3 llama ministral ministral3 mistral nemotron olmo olmo2 olmo3
    phi3 qwen2 qwen3 seed_oss smollm3 stablelm vaultgemma
"""
_POST_NORMS = {
    "post_feedforward_layernorm": "gemma2 gemma3_text gemma3 vaultgemma olmo2 olmo3 exaone4",
    "post_mlp_layernorm": "glm4",
}
_SHARED_EXPERTS = {
    "shared_expert": "qwen2_moe",
    "shared_experts": "deepseek_v2 deepseek_v3 dots1 ernie4_5_moe glm4_moe",
}


def _table() -> dict[str, Layout]:
    gpt2 = Layout(
        "gpt2",
        blocks="transformer.h",
        mlp_out="mlp.c_proj",
        attn_out="attn.c_proj",
        embed="transformer.wte",
    )
    rows = [
        *(Layout(name) for name in _LLAMA_LIKE.split()),
        Layout(
            "gemma3",
            blocks="model.language_model.layers",
            embed="model.language_model.embed_tokens",
        ),
        *(
            Layout(
                name,
                mlp_out=f"mlp.{expert}.down_proj",
                dense_out="mlp.down_proj",
                shared_expert=True,
                output_gate="mlp.shared_expert_gate" if expert == "shared_expert" else None,
                reason="known model type; its shared experts are edited, which all tokens pass, no routed ones",
            )
            for expert, names in _SHARED_EXPERTS.items()
            for name in names.split()
        ),
        Layout("starcoder2", mlp_out="mlp.c_proj"),
        Layout("phi", mlp_out="mlp.fc2", attn_out="self_attn.dense"),
        Layout(
            "opt",
            blocks="model.decoder.layers",
            mlp_out="fc2",
            attn_out="self_attn.out_proj",
            embed="model.decoder.embed_tokens",
        ),
        Layout(
            "gpt_neox",
            blocks="gpt_neox.layers",
            mlp_out="mlp.dense_4h_to_h",
            attn_out="attention.dense",
            head="lm_head",
            embed="gpt_neox.embed_in",
        ),
        gpt2,
        replace(gpt2, model_type="gpt_neo", attn_out="attn.attention.out_proj"),
        replace(gpt2, model_type="gpt_bigcode"),
        replace(gpt2, model_type="gptj", mlp_out="mlp.fc_out", attn_out="attn.out_proj"),
        replace(gpt2, model_type="codegen", mlp_out="mlp.fc_out", attn_out="attn.out_proj"),
        replace(
            gpt2,
            model_type="bloom",
            mlp_out="mlp.dense_4h_to_h",
            attn_out="self_attention.dense",
            embed="transformer.word_embeddings",
        ),
        replace(
            gpt2,
            model_type="falcon",
            mlp_out="mlp.dense_4h_to_h",
            attn_out="self_attention.dense",
            embed="transformer.word_embeddings",
        ),
        replace(
            gpt2,
            model_type="mpt",
            blocks="transformer.blocks",
            mlp_out="ffn.down_proj",
            attn_out="attn.out_proj",
        ),
    ]
    norms = {name: norm for norm, names in _POST_NORMS.items() for name in names.split()}
    return {row.model_type: replace(row, post_mlp_norm=norms.get(row.model_type)) for row in rows}


def known_types() -> list[str]:
    """The model types of the table, sorted; other types are tried by structure."""
    return sorted(_table())


def table_row(model_type: str) -> Layout:
    """Module names of a known model type, before a look at a model.

    Raises:
        KeyError: not in the table.
    """
    return _table()[model_type]


def mixtures() -> list[str]:
    """The model types of the table that are mixtures with shared experts, sorted."""
    return sorted(name for names in _SHARED_EXPERTS.values() for name in names.split())


def see_known() -> str:
    """For messages: which types the table has."""
    return f"Known: {', '.join(known_types())}. See lm/layout.py."
