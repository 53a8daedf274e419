"""The layout of a loaded model: from the table by its type, else by structure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from editunlearn.errors import UnsupportedError
from editunlearn.lm.configs import no_shared_expert, text_config
from editunlearn.lm.layout import Layout, Site, known_types, module, see_known, table_row
from editunlearn.lm.structure import expert_in, longest_blocks, output_head, search
from editunlearn.lm.weights import find


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
    row = table_row(kind) if kind in known_types() else None
    missing = _missing(row, model) if row is not None else None
    if row is None or missing:
        row = _by_structure(model, config, kind)
        if missing:
            row = replace(row, reason=f"no module {missing!r} in this {kind}; {row.reason}")
    row = _adapted(row, model, config)
    for block in () if row.shared_expert else module(model, row.blocks).children():
        if (expert := expert_in(block)) is not None:
            raise UnsupportedError(no_shared_expert(kind, f"{expert} in its blocks"))
    return row


def _by_structure(model: nn.Module, config: Any, kind: str) -> Layout:
    hidden = getattr(text_config(config), "hidden_size", None) if config is not None else None
    longest = longest_blocks(model)
    # Experts come first: "no MLP output projection" would be true of them, but not the reason.
    if longest is not None and (expert := expert_in(longest[1][-1])) is not None:
        raise UnsupportedError(no_shared_expert(kind, f"{expert} in its blocks"))
    try:
        if not isinstance(hidden, int):
            raise LookupError("states no hidden_size, so its MLP cannot be told from its other parts")
        found = search(model, hidden)
    except LookupError as problem:
        raise UnsupportedError(f"model type {kind!r} {problem}. {see_known()}") from None
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
