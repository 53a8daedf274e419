"""A model of which only some blocks run: the others hand on what they get, and one gets what it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editunlearn.lm.head import before_head
from editunlearn.lm.hooks import first_tensor, stack

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM


def blocks_of(lm: LM) -> list[nn.Module]:
    """All blocks, in their order."""
    return [lm.layout.module(lm.model, lm.layout.block_name(i)) for i in range(lm.layout.num_layers(lm.model))]


def states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among what a block is called with."""
    return first_tensor(args[0] if args else next(iter(kwargs.values())))


@contextmanager
def _passing(block: nn.Module, outputs: int, instead: Tensor | None = None) -> Iterator[None]:
    """The block returns its hidden states as they came, or others instead."""
    own = block.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = states_of(args, kwargs) if instead is None else instead
        return (states, *[None] * (outputs - 1)) if outputs else states

    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        del block.__dict__["forward"]
        if own is not None:
            block.__dict__["forward"] = own


@contextmanager
def _fed(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """The block gets ``hidden`` instead of what it is given."""

    def feed(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): hidden}

    handle = block.register_forward_pre_hook(feed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def returned(lm: LM) -> int:
    """How many things a block returns; 0: the hidden states themselves."""
    outputs: list[object] = []
    handle = blocks_of(lm)[0].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with before_head(lm.head, torch.ones(1, 1, dtype=torch.bool)):
            lm.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=lm.device), use_cache=False)
    finally:
        handle.remove()
    return len(outputs[0]) if isinstance(outputs[0], tuple) else 0


@contextmanager
def skipping(lm: LM, numbers: Sequence[int]) -> Iterator[None]:
    """The blocks ``numbers`` hand on what they get."""
    blocks, count = blocks_of(lm), returned(lm)
    with stack([_passing(blocks[i], count) for i in numbers]):
        yield


@contextmanager
def from_block(lm: LM, first: int, entering: Tensor, outputs: int) -> Iterator[None]:
    """The blocks below ``first`` hand on what they get, and ``first`` gets ``entering``.

    It comes as the output of the block before, where hooks can still change it.
    """
    blocks = blocks_of(lm)
    if first == 0:
        with _fed(blocks[0], entering):
            yield
        return
    *below, last = blocks[:first]
    with stack([_passing(block, outputs) for block in below]), _passing(last, outputs, entering):
        yield
