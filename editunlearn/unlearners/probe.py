"""Gradients of the model as it came, on what is to be forgotten and on what is to stay, and where they say to train."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.deltas.changes import Changes
from editunlearn.errors import InputError
from editunlearn.unlearners import localise, losses, parameters
from editunlearn.unlearners.localise import Masks
from editunlearn.unlearners.localised import GRIN, LocalisedHParams, LoKU, MemFlex
from editunlearn.unlearners.parameters import Adapters
from editunlearn.unlearners.passes import Passes
from editunlearn.unlearners.rows import Pool
from editunlearn.unlearners.training import gradients

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.hparams import UnlearnerHParams
    from editunlearn.lm.loading import LM
    from editunlearn.lm.tokens import Row

Gradients = dict[str, Tensor]


def masks(
    lm: LM, names: Sequence[str], pools: Mapping[str, Pool], hp: UnlearnerHParams, console: Console
) -> Masks | None:
    """Where a method trains, by module; None: everywhere.

    Raises:
        InputError: nowhere.
    """
    if not isinstance(hp, LocalisedHParams):
        return None
    console.info("probe: gradients of what is to be forgotten and of what is to stay")
    probe = Changes(lm, names)
    kept = _some(pools["retain"], hp)
    found = hp.masks(*(_gradient(lm, probe, pool, hp, console) for pool in (pools["forget"], kept)))
    if hp.random:
        found = localise.at_random(found, hp.seed)
    shapes = {name: tuple(value.shape) for name, value in probe.values.items()}
    trained, all_of_them = localise.chosen(found, shapes), sum(value.numel() for value in probe.values.values())
    if not trained:
        raise InputError(
            f"{hp.method} finds nothing to train: raise cosine or lower magnitude (scale: relative fits all models)."
        )
    how = "at random, as the control" if hp.random else "by their gradients"
    places = sum(bool(mask.any()) for mask in found.values())
    console.info(f"trained: {trained / all_of_them:.3%} of the weights, in {places} matrices, chosen {how}")
    return {name: mask for name, mask in found.items() if bool(mask.any())}


def _some(pool: Pool, hp: LocalisedHParams | LoKU) -> Pool:
    """Rows to keep that are looked at."""
    numbers = list(range(len(pool.rows)))
    random.Random(hp.seed).shuffle(numbers)
    return Pool([pool.rows[i] for i in sorted(numbers[: hp.probe])], 0)


def _gradient(lm: LM, probe: Changes, pool: Pool, hp: LocalisedHParams, console: Console) -> Gradients:
    if isinstance(hp, MemFlex):
        pool = disturbed(lm, pool, hp.copies, hp.seed)
    passes = Passes(lm, probe, {"rows": pool}, hp.tokens_at_once)
    return gradients(passes, probe, "rows", lambda view: losses.nll(view.now), hp.tokens_at_once, console.warn)


def disturbed(lm: LM, pool: Pool, copies: int, seed: int) -> Pool:
    """MemFlex's probe: copies of each row in which half of the answer's tokens, drawn with replacement, are random;
    the model reads them and is asked for them."""
    draw = random.Random(seed)
    special = set(lm.tokenizer.all_special_ids)
    allowed = [i for i in range(len(lm.tokenizer)) if i not in special]
    made: list[Row] = []
    for row in pool.rows:
        for _ in range(copies):
            ids = list(row.ids)
            length = len(ids) - row.prompt_length
            for _ in range(length // 2):
                ids[row.prompt_length + draw.randrange(length)] = draw.choice(allowed)
            made.append(replace(row, ids=tuple(ids)))
    return Pool(made, 0)


def begin(
    lm: LM,
    trained: parameters.Trained,
    pools: Mapping[str, Pool],
    hp: UnlearnerHParams,
    where: Masks | None,
    console: Console,
) -> None:
    """What stands in the values before the first update: GRIN's noise, LoKU's factors, else nothing."""
    if isinstance(hp, GRIN) and isinstance(trained, Changes) and where is not None:
        draw = torch.Generator().manual_seed(hp.seed)
        for name, value in trained.values.items():
            noise = torch.randn(value.shape, generator=draw).to(value.device)
            value.copy_(hp.noise * trained.units[name] * noise * where[name])
        trained.refresh()
    if isinstance(hp, LoKU) and isinstance(trained, Adapters):
        console.info("probe: Fisher information of what is to be forgotten and of what is to stay")
        probe = Changes(lm, trained.names)
        forget, keep = (fisher(lm, probe, pool, hp) for pool in (pools["forget"], _some(pools["retain"], hp)))
        mean = sum(float(f.double().sum()) for f in keep.values()) / sum(f.numel() for f in keep.values())
        for name in trained.names:
            importance = forget[name] / (keep[name] + hp.epsilon * max(mean, 1e-30))
            weight = lm.layout.read_weight(lm.model, name).float()
            left, right = fila(weight, importance, hp.train.rank, trained.scale, hp.seed)
            trained.put(name, left, right)


def fisher(lm: LM, probe: Changes, pool: Pool, hp: UnlearnerHParams) -> Gradients:
    """Squared gradient of each row's mean loss, averaged over rows by their scored tokens."""
    size = hp.tokens_at_once
    passes = Passes(lm, probe, {"rows": pool}, size)
    total = {name: torch.zeros_like(value) for name, value in probe.values.items()}
    tokens = 0
    for number, row in enumerate(pool.rows):
        scored = len(row.ids) - row.prompt_length
        found = gradients(
            passes, probe, "rows", lambda v: losses.nll(v.now), hp.tokens_at_once, lambda _: None, [number]
        )
        for name, gradient in found.items():
            total[name] += scored * gradient.square()
        tokens += scored
    return {name: value / tokens for name, value in total.items()}


@torch.no_grad()
def fila(weight: Tensor, importance: Tensor, rank: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """FILA (LoKU, arXiv 2408.06621): LoRA factors of the part of a weight that matters most: (out, r) and (r, in).

    The rank-r part of diag(s) W, s the root of each row's importance, divided by ``scale`` and with s taken off again.
    s is divided by its mean, which moves size from one factor to the other and leaves their product.
    """
    s = importance.sum(1).sqrt()
    s = s / s.mean().clamp(min=1e-30) + 1e-5
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        u, values, v = torch.svd_lowrank(s[:, None] * weight, q=min(rank + 8, *weight.shape), niter=4)
    root = (values[:rank] / scale).sqrt()
    return u[:, :rank] * root / s[:, None], (v[:, :rank] * root).T
