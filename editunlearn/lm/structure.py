"""Finds the MLP output projections of a model that is not in the table of ``layout`` by its structure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from editunlearn.lm.weights import is_conv1d

_OTHER_TOWERS = ("vision", "visual", "audio", "image", "speech", "encoder.")
_MIXERS = ("attn", "attention", "mixer", "mamba", "ssm", "conv")


@dataclass(frozen=True)
class Found:
    """Names in the sense of ``layout.Layout``, and what they were told by."""

    blocks: str
    mlp_out: str
    attn_out: str | None
    post_mlp_norm: str | None
    head: str
    embed: str
    reason: str


def expert_in(block: nn.Module) -> str | None:
    """Class name of the first router or group of experts inside a block; None for a dense block."""
    for name, child in block.named_modules():
        kind = type(child).__name__.lower()
        named = "moe" in kind and not any(word in kind for word in (*_MIXERS, "norm"))  # Qwen2MoeAttention has none
        if name and (name.rpartition(".")[2] in ("experts", "router") or named or "experts" in kind):
            return type(child).__name__
    return None


def longest_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The longest list of modules of one class that is not part of a vision, audio or encoder tower."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, child in model.named_modules():
        if any(tower in f"{name.lower()}." for tower in _OTHER_TOWERS):
            continue
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1:
            lists.append((name, child))
    return max(lists, key=lambda item: (len(item[1]), -len(item[0])), default=None)


def search(model: nn.Module, hidden: int) -> Found:
    """Find blocks, MLP output projection, the norm behind it, head and embedding.

    The blocks are the longest list of modules of one class; in a block, the projection is the last linear map
    to the hidden size with the largest inner width that is neither in attention nor in another token mixer.

    Args:
        model: a causal language model with its head.
        hidden: width of the residual stream.

    Raises:
        LookupError: something cannot be told; the text completes "model type X ...".
    """
    longest = longest_blocks(model)
    if longest is None:
        raise LookupError("has no list of identical blocks")
    blocks_name, blocks = longest
    outs = {_mlp_out(block, hidden) for block in blocks}
    mlp_out = outs.pop()
    if outs or mlp_out is None:
        raise LookupError("has no MLP output projection to edit")
    head, embed = output_head(model), _name_of(model, "get_input_embeddings")
    if head is None or embed is None:
        raise LookupError("has no language-model head or no input embedding")
    names = [name for name, _ in blocks[0].named_children() if "post" in name and "norm" in name]
    post = [name for name in names if any(word in name for word in ("mlp", "ffn", "feed_forward", "feedforward"))]
    return Found(
        blocks=blocks_name,
        mlp_out=mlp_out,
        attn_out=_attn_out(blocks[0], hidden),
        post_mlp_norm=post[-1] if post else None,
        head=head,
        embed=embed,
        reason=f"found by structure: {len(blocks)} x {type(blocks[0]).__name__} in {blocks_name}, "
        f"of which {mlp_out} is the widest map back to {hidden}",
    )


def _width(child: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear map of any library, None for any other module."""
    if is_conv1d(child):
        rows, columns = child.get_parameter("weight").shape
        return rows, columns
    inner, outer = getattr(child, "in_features", None), getattr(child, "out_features", None)
    return (inner, outer) if isinstance(inner, int) and isinstance(outer, int) else None


def _mlp_out(block: nn.Module, hidden: int) -> str | None:
    best: tuple[int, str] | None = None
    linear = {name: width for name, child in block.named_modules() if (width := _width(child)) is not None}
    for name, (inner, outer) in linear.items():
        if outer != hidden or any(word in name.lower() for word in _MIXERS):
            continue
        owner = name.rpartition(".")[0]
        # An MLP has a way in, too: without it this is some other projection.
        way_in = any(
            width[0] == hidden for other, width in linear.items() if other != name and other.rpartition(".")[0] == owner
        )
        if way_in and (best is None or inner >= best[0]):
            best = (inner, name)
    return best[1] if best else None


def _attn_out(block: nn.Module, hidden: int) -> str | None:
    """The last linear map of the attention, which leads back to the hidden size."""
    linear = [(name, width) for name, child in block.named_modules() if (width := _width(child)) is not None]
    found = [name for name, (_, outer) in linear if outer == hidden and "att" in name.lower()]
    return found[-1] if found else None


def output_head(model: nn.Module) -> str | None:
    """Full name of the language-model head; None when there is none."""
    return _name_of(model, "get_output_embeddings")


def _name_of(model: nn.Module, getter: str) -> str | None:
    method = getattr(model, getter, None)
    wanted = method() if callable(method) else None
    if wanted is None:
        return None
    return next((name for name, child in model.named_modules() if child is wanted), None)
