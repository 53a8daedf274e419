"""AnyEdit (arXiv 2502.05628), written down literally: one fact and one chunk at a time, whole rows, no cache.

Chunk after chunk, a value is trained at the token before it, with the changes of the earlier chunks held in place; then
layer after layer the keys of all chunk tokens are written, and those of all other tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import _seen
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """One window of a target: what stands before it and itself, where it is written, and where it starts."""

    ids: tuple[int, ...]
    at: int
    start: int


def windows(prompt: Sequence[int], target: Sequence[int], size: int, first: int) -> list[Chunk]:
    """Cut ``target`` into windows of ``size`` tokens; the first one is written at token ``first`` of the prompt."""
    found, before = [], list(prompt)
    for begin in range(0, len(target), size):
        window = list(target[begin : begin + size])
        found.append(Chunk((*before, *window), len(before) - 1 if begin else first, len(before)))
        before += window
    return found


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _nll(lm: Any, chunk: Chunk, module: str, changes: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Mean NLL of the chunk's tokens with ``changes`` (token, what is added there) of a module's output."""

    def hook(_module: Any, _args: Any, result: Any) -> Any:
        states = _output(result).clone()
        for token, change in changes:
            states[0, token] = states[0, token] + change
        return (states, *result[1:]) if isinstance(result, tuple) else states

    handle = lm.model.get_submodule(module).register_forward_hook(hook)
    try:
        logits = lm.model(input_ids=torch.tensor([chunk.ids[:-1]]), use_cache=False).logits[0]
    finally:
        handle.remove()
    logp = logits[chunk.start - 1 :].log_softmax(-1)
    return -logp[torch.arange(len(logp)), torch.tensor(chunk.ids[chunk.start :])].mean()


def values(
    lm: Any, chunks: Sequence[Chunk], module: str, *, steps: int, lr: float, decay: float, clamp: float
) -> list[tuple[Tensor, Tensor]]:
    """For each chunk of one fact (clean output with the earlier changes in place, change), each (d,).

    ``lr`` in units of the clean output's root mean square; the penalty is the squared norm relative to the clean one.
    """
    done: list[tuple[int, Tensor]] = []
    found = []
    for chunk in chunks:
        clean = _with(lm, chunk, module, done)
        unit = clean.square().mean().sqrt()
        step = torch.zeros_like(clean, requires_grad=True)
        adam = torch.optim.Adam([step], lr=lr)
        for _ in range(steps):
            change = step * unit
            loss = _nll(lm, chunk, module, [*done, (chunk.at, change)]) + decay * (change.norm() / clean.norm()) ** 2
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                longest = clamp * clean.norm() / unit
                step *= min(1.0, float(longest / step.norm()))
        done.append((chunk.at, (step * unit).detach()))
        found.append((clean, done[-1][1]))
    return found


@torch.no_grad()
def _with(lm: Any, chunk: Chunk, module: str, changes: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The module's output at the chunk's own token, the earlier changes being in place."""
    seen: list[Tensor] = []

    def hook(_module: Any, _args: Any, result: Any) -> Any:
        states = _output(result).clone()
        for token, change in changes:
            states[0, token] += change
        seen.append(states[0, chunk.at])
        return (states, *result[1:]) if isinstance(result, tuple) else states

    handle = lm.model.get_submodule(module).register_forward_hook(hook)
    try:
        lm.model(input_ids=torch.tensor([chunk.ids]), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


Update = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, keys of other tokens (d_in, m), keys of chunks (d_in, n), R (d_out, n)) -> dW (d_out, d_in)."""


def write(
    lm: Any,
    layers: Sequence[int],
    facts: Sequence[Sequence[Chunk]],
    found: Sequence[Sequence[tuple[Tensor, Tensor]]],
    update: Update,
) -> dict[int, Tensor]:
    """dW by layer, (d_out, d_in) float64; written into the weights layer by layer and taken back at the end.

    Args:
        found: what ``values`` found on the last layer's block.
        update: the method's closed form at one layer.
    """
    updates: dict[int, Tensor] = {}
    saved: dict[int, Tensor] = {}
    last = lm.layout.block_name(layers[-1])
    try:
        for index, layer in enumerate(layers):
            name = lm.layout.site(layer).name
            others, keys, missing = [], [], []
            for chunks, results in zip(facts, found, strict=True):
                whole = chunks[-1].ids
                for token in set(range(len(whole))) - {chunk.at for chunk in chunks}:
                    others.append(_seen(lm, whole, token, name, output=False))
                for chunk, (clean, change) in zip(chunks, results, strict=True):
                    keys.append(_seen(lm, whole, chunk.at, name, output=False))
                    now = _seen(lm, whole, chunk.at, last, output=True)
                    missing.append((clean.double() + change.double() - now) / (len(layers) - index))
            updates[layer] = update(layer, *(torch.stack(part, 1) for part in (others, keys, missing)))
            parameter = lm.layout.read_weight(lm.model, name)
            saved[layer] = parameter.clone()
            parameter += updates[layer].to(parameter.dtype)
    finally:
        for layer, old in saved.items():
            lm.layout.read_weight(lm.model, lm.layout.site(layer).name).copy_(old)
    return updates
