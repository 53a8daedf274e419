"""What a model's configuration alone says: its text model, its length, whether it can be edited at all."""

from __future__ import annotations

from typing import Any

from editunlearn.errors import UnsupportedError
from editunlearn.lm.layout import known_types, mixtures, see_known

# Blocks of these types have no MLP, or mix it into a state-space layer.
_NO_MLP = ("mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv", "reformer", "cpmant", "xlnet")
_SHARED_COUNTS = "shared_expert_intermediate_size n_shared_experts moe_num_shared_experts".split()
_EXPERT_COUNTS = "num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts".split()


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model (the config itself, but for multimodal wrappers)."""
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if callable(getter) else config


def context_length(config: Any) -> int | None:
    """Tokens that a model takes at most; None when its configuration does not say."""
    found = getattr(text_config(config), "max_position_embeddings", None) if config is not None else None
    return int(found) if found and found > 0 else None


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
        raise UnsupportedError(f"model type {kind!r} has no MLP output projection to edit. {see_known()}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"model type {kind!r} is an encoder-decoder; only decoders can be edited. {see_known()}")
    experts = _expert_count(text)
    shared = kind in mixtures() and any(getattr(text, key, None) for key in _SHARED_COUNTS)
    if experts > 1 and not shared:
        raise UnsupportedError(no_shared_expert(kind, f"{experts} experts in each MLP"))
    if kind in known_types():
        return
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UnsupportedError(
            f"model type {kind!r} is an encoder, a masked language model, not a decoder. {see_known()}"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "auto_map", None):
        raise UnsupportedError(f"model type {kind!r} is no causal language model of transformers. {see_known()}")


def no_shared_expert(kind: str, what: str) -> str:
    """Why a mixture of experts is refused; ``what``: how it was seen to be one."""
    return (
        f"model type {kind!r} is a mixture of experts ({what}) without a shared one: which weights a fact passes "
        "through depends on the routing, which differs from wording to wording, so there is no one MLP output "
        f"projection to edit. Mixtures with shared experts, which all tokens pass: {', '.join(mixtures())}. "
        f"{see_known()}"
    )
