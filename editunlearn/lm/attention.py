"""Attention over many short rows that are differentiated: on a CPU the kernel made for long rows spends its time on
overheads there, and heads that share keys are better taken as more queries of one head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

LONGEST = 128
"""Tokens of a row up to which this is faster, forward and backward together; for a forward pass alone it never is."""

NAME = "sdpa"
"""What transformers calls the implementation that this stands in for."""


@contextmanager
def short_rows(device: torch.device) -> Iterator[None]:
    """Inside, models of transformers that use torch's attention use this one for short rows that need a gradient."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KNOWN

    plain = KNOWN[NAME]
    if device.type != "cpu" or getattr(plain, "is_folding", False):
        yield
        return

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        found = _folded(module, query, key, value, mask, **more) if _short(query, key) else None
        return plain(module, query, key, value, mask, **more) if found is None else found

    attend.is_folding = True  # type: ignore[attr-defined]
    KNOWN[NAME] = attend
    try:
        yield
    finally:
        del KNOWN[NAME]  # type: ignore[no-untyped-call]


def _short(query: Tensor, key: Tensor) -> bool:
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return gradient and query.shape[2] > 1 and key.shape[2] <= LONGEST and query.shape[1] % key.shape[1] == 0


def _folded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None] | None:
    """Attention with the heads of each key as further queries of it; None for what this does not know how to do.

    Args:
        query: (batch, heads, length, width).
        key, value: (batch, heads that share keys, keys, width).
        mask: (batch or 1, 1, length, keys), bool or to be added.

    Returns:
        (batch, length, heads, width), and no weights.
    """
    rows, heads, length, width = query.shape
    shared, keys = key.shape[1:3]
    if any(more.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux")):
        return None
    if mask is None:
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            return None
        if keys != length:
            return None
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None
    groups = heads // shared
    mask = mask[:, :, None].expand(-1, 1, groups, -1, -1).reshape(len(mask), 1, groups * length, keys)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(rows, shared, groups * length, width), key, value, mask, dropout, scale=scaling
        )
    return found.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None
