"""Where a model keeps its MLP output projections: the only table of module names in this package.

A *site* is the last linear map of a block's MLP (``down_proj``, ``c_proj``, ``fc2``, ...): the weight that
editors change. Elsewhere the talk is of sites and (out, in) matrices; only here (and in ``weights``) it is
known that GPT-2 stores the transpose, and that Gemma has a second norm behind its MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm.structure import expert_in, longest_blocks, output_head, search
from editunlearn.lm.weights import find, is_transposed, module, quantisation, read_weight

__all__ = [
    "Layout",
    "Site",
    "check_config",
    "is_transposed",
    "known_types",
    "layout_of",
    "module",
    "quantisation",
    "read_weight",
    "resolve_layers",
    "context_length",
    "text_config",
]


@dataclass(frozen=True)
class Site:
    """One editable weight: the full module name and the block that it sits in (0 is the first)."""

    name: str
    layer: int


@dataclass(frozen=True)
class Layout:
    """Module names of one model, and what happens to the MLP output before it reaches the residual stream.

    ``mlp_out``, ``dense_out``, ``attn_out``, ``output_gate`` and ``post_mlp_norm`` are relative to a block, all other
    names to the model; None where there is no such module.

    Attributes:
        attn_out: last linear map of a block's attention. Nothing edits it; tracing reads and restores its output.
        dense_out, dense_layers: of a mixture of experts, the same projection in the blocks whose MLP is a plain one.
        output_gate: linear map whose sigmoid, one number a token, scales the MLP output (shared expert of Qwen2-MoE).
        shared_expert: ``mlp_out`` is that of an expert that all tokens pass; the routed ones beside it are left alone.
        post_mlp_norm: norm that the MLP output passes before it is added to the residual stream.
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


def _see_known() -> str:
    return f"Known: {', '.join(known_types())}. See lm/layout.py."


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model (the config itself, but for multimodal wrappers)."""
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if callable(getter) else config


def context_length(config: Any) -> int | None:
    """Tokens that a model takes at most; None when its configuration does not say."""
    found = getattr(text_config(config), "max_position_embeddings", None) if config is not None else None
    return int(found) if found and found > 0 else None


# --- what can be said from the config alone


# Blocks of these types have no MLP, or mix it into a state-space layer.
_NO_MLP = ("mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv", "reformer", "cpmant", "xlnet")
_SHARED_COUNTS = "shared_expert_intermediate_size n_shared_experts moe_num_shared_experts".split()
_EXPERT_COUNTS = "num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts".split()


def _expert_count(config: Any) -> int:
    ffn = getattr(config, "ffn_config", None)  # DBRX keeps the number of experts one level down
    places = [place for place in (config, ffn) if place is not None]
    counts = [getattr(place, key, None) for place in places for key in _EXPERT_COUNTS]
    flat = [n for count in counts for n in (count if isinstance(count, (list, tuple)) else [count])]
    return max([n for n in flat if isinstance(n, int)], default=0)


def check_config(config: Any) -> None:
    """Refuse, before any weight is loaded, a model that the config alone shows to be uneditable.

    Raises:
        UnsupportedError: no MLP, mixture of experts, encoder-decoder, encoder only, or not a language model.
    """
    kind = str(getattr(config, "model_type", None) or "")
    text = text_config(config)
    text_kind = str(getattr(text, "model_type", None) or kind)
    if kind in _NO_MLP or text_kind in _NO_MLP:
        raise UnsupportedError(f"model type {kind!r} has no MLP output projection to edit. {_see_known()}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"model type {kind!r} is an encoder-decoder; only decoders can be edited. {_see_known()}"
        )
    experts = _expert_count(text)
    shared = kind in _mixtures() and any(getattr(text, key, None) for key in _SHARED_COUNTS)
    if experts > 1 and not shared:
        raise UnsupportedError(_moe_message(kind, f"{experts} experts in each MLP"))
    if kind in known_types():
        return
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UnsupportedError(
            f"model type {kind!r} is an encoder, a masked language model, not a decoder. {_see_known()}"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "auto_map", None):
        raise UnsupportedError(f"model type {kind!r} is no causal language model of transformers. {_see_known()}")


def _mixtures() -> list[str]:
    return sorted(name for names in _SHARED_EXPERTS.values() for name in names.split())


def _moe_message(kind: str, what: str) -> str:
    return (
        f"model type {kind!r} is a mixture of experts ({what}) without a shared one: which weights a fact passes "
        "through depends on the routing, which differs from wording to wording, so there is no one MLP output "
        f"projection to edit. Mixtures with shared experts, which all tokens pass: {', '.join(_mixtures())}. "
        f"{_see_known()}"
    )


# --- the layout of a loaded model


def layout_of(model: nn.Module, config: Any = None) -> Layout:
    """Module names of a model: from the table by ``config.model_type``, else by structure; see ``reason``.

    Args:
        model: a causal language model with its head; on the meta device too.
        config: default ``model.config``.

    Raises:
        UnsupportedError: mixture of experts, or no MLP output projection can be found.
    """
    config = config if config is not None else getattr(model, "config", None)
    kind = str(getattr(config, "model_type", None) or type(model).__name__)
    row = _table().get(kind)
    missing = _missing(row, model) if row is not None else None
    if row is None or missing:
        row = _by_structure(model, config, kind)
        if missing:
            row = replace(row, reason=f"no module {missing!r} in this {kind}; {row.reason}")
    row = _adapted(row, model, config)
    for block in () if row.shared_expert else module(model, row.blocks).children():
        if (expert := expert_in(block)) is not None:
            raise UnsupportedError(_moe_message(kind, f"{expert} in its blocks"))
    return row


def _by_structure(model: nn.Module, config: Any, kind: str) -> Layout:
    hidden = getattr(text_config(config), "hidden_size", None) if config is not None else None
    longest = longest_blocks(model)
    # Experts come first: "no MLP output projection" would be true of them, but not the reason.
    if longest is not None and (expert := expert_in(longest[1][-1])) is not None:
        raise UnsupportedError(_moe_message(kind, f"{expert} in its blocks"))
    try:
        if not isinstance(hidden, int):
            raise LookupError("states no hidden_size, so its MLP cannot be told from its other parts")
        found = search(model, hidden)
    except LookupError as problem:
        raise UnsupportedError(f"model type {kind!r} {problem}. {_see_known()}") from None
    return Layout(kind, **vars(found))


def _adapted(row: Layout, model: nn.Module, config: Any) -> Layout:
    """What differs between checkpoints of one model type."""
    multiplier = getattr(text_config(config), "residual_multiplier", None) if config is not None else None
    post, attention = row.post_norm_name(0), row.attention_name(0)
    return replace(
        row,
        dense_layers=_dense_layers(row, model),
        attn_out=row.attn_out if attention and find(model, attention) else None,
        scales_output=float(multiplier) if isinstance(multiplier, (int, float)) else row.scales_output,
        head=row.head if find(model, row.head) else str(output_head(model)),
        post_mlp_norm=row.post_mlp_norm if post and find(model, post) else None,
    )


def _all_sites(row: Layout, model: nn.Module) -> list[Site]:
    """The sites of all blocks of a mixture, whose blocks may differ; else of the first, which is like the others."""
    blocks = find(model, row.blocks)
    return row.sites(range(len(blocks) if row.shared_expert and isinstance(blocks, nn.ModuleList) else 1))


def _dense_layers(row: Layout, model: nn.Module) -> frozenset[int]:
    """Blocks of a mixture that have the plain projection."""
    plain = [replace(site, name=f"{row.block_name(site.layer)}.{row.dense_out}") for site in _all_sites(row, model)]
    return frozenset(site.layer for site in plain if row.dense_out and find(model, site.name) is not None)


def _missing(row: Layout, model: nn.Module) -> str | None:
    row = replace(row, dense_layers=_dense_layers(row, model))
    names = (row.blocks, *(site.name for site in _all_sites(row, model)), row.embed)
    missing = next((name for name in names if find(model, name) is None), None)
    # GPT-NeoX called its head embed_out in earlier versions of transformers: the name alone proves nothing.
    return missing or (row.head if find(model, row.head) is None and output_head(model) is None else None)


# --- the `layers` field of the hyperparameters


def resolve_layers(
    spec: str | Sequence[int | float], n_layers: int, default: Sequence[int | float]
) -> tuple[list[int], str]:
    """Block numbers for the ``layers`` field.

    Args:
        spec: ``auto``, ``located`` (whose blocks are known only with the weights: until then those of ``auto``), or
            a list of block numbers (ints, 0 is the first) and depths (floats from 0 to 1, where
            0.5 is the middle).
        n_layers: number of blocks of the model.
        default: what ``auto`` stands for, in the same notation.

    Returns:
        The block numbers, sorted, each once; and one phrase that says where they come from.

    Raises:
        InputError: not a list of numbers, out of range, or a block number given twice.
    """
    if isinstance(spec, str):
        if spec not in ("auto", "located"):
            raise InputError(f"layers: {spec!r} is neither 'auto' nor 'located' nor a list such as [3, 4] or [0.2].")
        layers, why = resolve_layers(default, n_layers, default)
        return layers, f"auto: {why}" if spec == "auto" else "located: known when the weights are; as many as these"
    problems: list[str] = []
    numbers: set[int] = set()
    depths: list[int] = []
    for item in spec:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            problems.append(f"layers: {item!r} is not a number. Give block numbers (3) or depths (0.2).")
        elif isinstance(item, int):
            if not 0 <= item < n_layers:
                problems.append(f"layers: block {item} does not exist; there are blocks 0 to {n_layers - 1}.")
            elif item in numbers:
                problems.append(f"layers: block {item} is given twice.")
            numbers.add(item)
        elif not 0.0 <= item <= 1.0:
            problems.append(f"layers: depth {item} is not from 0.0 to 1.0. Write a block number without a point.")
        else:
            depths.append(min(int(item * n_layers + 1e-9), n_layers - 1))  # 0.29 * 100 is 28.999...
    if not spec:
        problems.append("layers: the list is empty. Give block numbers, depths, or 'auto'.")
    if problems:
        raise InputError(problems)
    layers = sorted(numbers | set(depths))
    if not depths:
        return layers, f"given, of {n_layers} blocks"
    given = ", ".join(f"{item:g}" for item in spec)
    merged = "" if len(layers) == len(spec) else " (those that fall on one block count once)"
    return layers, f"depth {given} of {n_layers} blocks{merged}"
