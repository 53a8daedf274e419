"""The literal way: what the public implementations of MEMIT and AlphaEdit compute, in the order they compute it.

The slow side of ``speed.py``, written for this project from the papers and from what was observed of the public code:
one fact at a time, whole forward passes with logits of all positions, one pass over the text for each layer, dense
d x d systems. It is correct on Gemma as well (one BOS, values mapped back through the norm behind the MLP), so that
its results can be compared with ours; nothing else about it is improved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from editunlearn.editors.keys import average
from editunlearn.editors.spread import before_norm
from editunlearn.lm.hooks import on_input, on_output, run_truncated, stack
from editunlearn.lm.tokens import Row, batch

PROMPTS = 128
"""Prompts in one forward pass when keys are collected."""


@torch.no_grad()
def statistics(lm: Any, names: Sequence[str], pieces: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """``C`` of each module's input: the text goes through the model again for every module, float32 sums."""
    found = {}
    for name in names:
        module = lm.layout.module(lm.model, name)
        total, count = torch.zeros(0), 0
        for piece in pieces:
            seen: list[Tensor] = []
            with on_input(module, seen.append):
                run_truncated(lm.model, module, input_ids=torch.tensor([list(piece)], device=lm.device))
            rows = seen[0].flatten(0, -2).float()
            product = rows.T @ rows
            total = product if count == 0 else total + product
            count += len(rows)
        found[name] = total / count
    return found


def value(
    lm: Any,
    rows: Sequence[Row],
    pinned: Sequence[Row],
    block: str,
    *,
    steps: int,
    lr: float,
    clamp: float,
    decay: float,
    kl: float,
) -> tuple[Tensor, Tensor, list[float]]:
    """One fact's change of a block's output: the clean output, the change and the target's NLL before each step.

    Each step is a whole pass over all contexts and the pinned prompt, the output head on every position, twice: once
    as part of the model, once on the last hidden states.
    """
    padded = batch([*rows, *pinned], lm.pad_id, lm.device)
    only = torch.arange(len(padded.input_ids), device=lm.device)
    with torch.no_grad():
        clean = _outputs(lm, [replace(rows[0], ids=rows[0].ids[: rows[0].prompt_length])], block)[0]
    change = torch.zeros_like(clean, requires_grad=True)
    adam = torch.optim.Adam([change], lr=lr)
    before: Tensor | None = None
    history = []

    def add(_inputs: Tensor, output: Tensor) -> Tensor:
        output = output.clone()
        output[only, padded.lookup] += change.to(output.dtype)
        return output

    for _ in range(steps):
        adam.zero_grad()
        last: list[Tensor] = []
        with on_output(lm.layout.module(lm.model, block), add), on_input(lm.head, last.append):
            logits = lm.model(**padded.inputs, use_cache=False).logits
        here = only[len(rows) :]
        log_q = logits[here, padded.lookup[here]].float().log_softmax(-1)
        before = log_q.detach() if before is None else before
        log_p = lm.head(last[0]).float().log_softmax(-1)
        scored = padded.targets.nonzero()
        token = -log_p[scored[:, 0], scored[:, 1]].gather(1, padded.labels[:, None])[:, 0]
        nll = torch.stack([token[padded.owners == row].mean() for row in range(len(rows))]).mean()
        loss = nll + kl * (before.exp() * (before - log_q)).sum(-1).mean() + decay * change.norm() / clean.norm() ** 2
        history.append(nll.item())
        loss.backward()
        adam.step()
        with torch.no_grad():
            limit = clamp * clean.norm()
            if change.norm() > limit:
                change *= limit / change.norm()
    return clean, change.detach(), history


@torch.no_grad()
def insert(
    lm: Any,
    layers: Sequence[int],
    rows: Sequence[Row],
    bare: Sequence[Row],
    wanted: Tensor,
    moments: dict[str, Tensor],
    weight: float,
) -> dict[str, Tensor]:
    """MEMIT's insertion: layer by layer the keys, what is still missing, a dense solve, a write. The writes are undone.

    Args:
        rows: all contexts of all facts, fact-major, the bare prompt first.
        bare: the bare prompt of each fact.
        wanted: output of the last edited block at each bare prompt, (n, d).
        moments: ``C`` by module name.
        weight: what ``C`` counts for.

    Returns:
        dW by module name, (d_out, d_in) float32.
    """
    last = lm.layout.block_name(layers[-1])
    updates: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    try:
        for index, layer in enumerate(layers):
            site = lm.layout.site(layer)
            keys = average(_inputs(lm, rows, site.name), len(bare))
            share = (wanted - _outputs(lm, bare, last)) / (len(layers) - index)
            norm = lm.layout.post_norm_name(layer)
            if norm is not None:
                share = before_norm(lm.layout.module(lm.model, norm), _outputs(lm, bare, site.name), share)
            updates[site.name] = memit_solve(moments[site.name], weight, keys, share).float()
            held = lm.layout.read_weight(lm.model, site.name)
            kept[site.name] = held.clone()
            held += updates[site.name].to(held)
    finally:
        for name, old in kept.items():
            lm.layout.read_weight(lm.model, name).copy_(old)
    return updates


def memit_solve(moment: Tensor, weight: float, keys: Tensor, residuals: Tensor) -> Tensor:
    """dW (d_out, d_in) by a dense float64 LU solve; keys (n, d_in), residuals (n, d_out)."""
    k = keys.double().T
    return residuals.double().T @ torch.linalg.solve(weight * moment.double() + k @ k.T, k).T


def alphaedit_solve(projector: Tensor, keys: Tensor, cache: Tensor, residuals: Tensor, l2: float) -> Tensor:
    """dW (d_out, d_in) by a dense float32 LU solve with a d x d projector and a d x d cache of past keys."""
    k = keys.T
    system = projector @ (k @ k.T + cache) + l2 * torch.eye(len(projector))
    return torch.linalg.solve(system, projector @ k @ residuals).T


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """The d x d projector by a float32 singular value decomposition."""
    u, values, _ = torch.linalg.svd(moment)
    free = u[:, values < threshold]
    return free @ free.T


def _inputs(lm: Any, rows: Sequence[Row], name: str) -> Tensor:
    return _traced(lm, rows, name, output=False)


def _outputs(lm: Any, rows: Sequence[Row], name: str) -> Tensor:
    return _traced(lm, rows, name, output=True)


@torch.no_grad()
def _traced(lm: Any, rows: Sequence[Row], name: str, *, output: bool) -> Tensor:
    """Input or output of a module at the lookup tokens, (rows, width); the model runs to its end, logits included."""
    found = []
    module = lm.layout.module(lm.model, name)
    for start in range(0, len(rows), PROMPTS):
        padded = batch(rows[start : start + PROMPTS], lm.pad_id, lm.device)
        seen: list[Tensor] = []
        hook = on_output(module, lambda _x, y, seen=seen: seen.append(y)) if output else on_input(module, seen.append)
        with stack([hook]):
            lm.model(**padded.inputs, use_cache=False)
        found.append(padded.at_lookup(seen[0]).float())
    return torch.cat(found)
