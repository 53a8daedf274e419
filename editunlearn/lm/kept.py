"""What autograd keeps of a token, counted on fake tensors, so that no architecture is written down."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from editunlearn.lm.layout import Layout

LENGTH = 64
"""Tokens of the row on which it is counted."""
HOLES = 1.5
"""Memory that small tensors of changing sizes take, relative to their own."""
AMPLE = 4.0
"""Numbers that are kept of a token for each that enters or leaves a linear map: about one, never that many."""


def kept_by_autograd(config: Any, dtype: str, first: int, trained: Sequence[str] = ()) -> float:
    """Bytes that a backward pass needs of each token of a forward pass, the head left out.

    Fake attention keeps more than the real one: up to three tenths of the whole in tiny models, next to nothing in
    large ones.

    Args:
        first: number of the block from whose input on gradients are wanted.
        trained: linear maps whose weights get gradients too.
    """
    if getattr(config, "num_experts", 0) and dtype == "float32":
        return 2 * kept_by_autograd(config, "bfloat16", first, trained)  # torch fakes grouped products in that alone
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    from editunlearn.lm.hooks import first_tensor
    from editunlearn.lm.recognise import layout_of

    with FakeTensorMode():
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(copy.deepcopy(config), dtype=getattr(torch, dtype)).eval()
        layout = layout_of(model, config)
        model.requires_grad_(False)
        for name in trained:
            layout.module(model, name).weight.requires_grad_(True)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage.nbytes()
            return tensor

        def wanted(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            first_tensor(args[0] if args else next(iter(kwargs.values()))).requires_grad_(True)

        layout.module(model, layout.block_name(first)).register_forward_pre_hook(wanted, with_kwargs=True)
        model.get_output_embeddings().forward = lambda hidden, *_, **__: hidden[:, :1, :1]
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=ids, use_cache=False)
    return sum(found.values()) / LENGTH


def at_most(model: nn.Module, layout: Layout, width: int) -> float:
    """More bytes than :func:`kept_by_autograd` would count, from the shapes of the blocks' weights alone.

    Args:
        width: bytes of a number.
    """
    weights = layout.module(model, layout.blocks).parameters()
    return AMPLE * width * sum(sum(weight.shape) for weight in weights if weight.ndim > 1)
