"""RMU: representation misdirection (arXiv 2403.03218), in units of the model's own states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.hooks import on_output
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Row, batch
from editunlearn.unlearners import losses, rows
from editunlearn.unlearners.objectives import RMU, retain_pool
from editunlearn.unlearners.rows import Pool
from editunlearn.unlearners.terms import Inside, Objective, Term, View

if TYPE_CHECKING:
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.lm.loading import LM


def objective(hp: RMU, lm: LM, request: ForgetRequest) -> Objective:
    """States of the answers to a random direction; those of what is to stay held."""
    layer = hp.auto_layers(lm.layout.num_layers(lm.model))[-1]
    forgotten = rows.forget(lm, request)
    unit = mean_norm(lm, forgotten.rows, layer)
    aim = steering(lm, hp.seed) * hp.steering * unit

    def misled(view: View) -> Tensor:
        inside = _inside(view)
        return losses.misdirection(inside.now, inside.owners, inside.count, aim)

    def held(view: View) -> Tensor:
        inside = _inside(view)
        return losses.displacement(inside.now, inside.base, inside.owners, inside.count, unit)

    def kept() -> Pool:
        pool = retain_pool(lm, request, hp.retain)
        return Pool([rows.whole(row) for row in pool.rows], 0)

    terms = (
        Term("forget", ("forget",), misled, hp.weight, layer=layer),
        Term("retain", ("retain",), held, hp.retain.weight, hp.retain.ratio, layer=layer),
    )
    return Objective(terms, {"forget": lambda: forgotten, "retain": kept})


def _inside(view: View) -> Inside:
    assert view.inside is not None  # noqa: S101 - the terms have a layer
    return view.inside


def steering(lm: LM, seed: int) -> Tensor:
    """A fixed random direction of positive numbers, (width,), of length 1."""
    width = int(lm.head.weight.shape[1])  # type: ignore[index]
    found = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(found, dim=0).to(lm.device)


@torch.no_grad()
def mean_norm(lm: LM, some: Sequence[Row], layer: int) -> float:
    """Mean norm of a block's states where the answers of some rows are predicted."""
    padded = batch(some, lm.pad_id, lm.device)
    seen: list[Tensor] = []

    def see(_inputs: Tensor, output: Tensor) -> None:
        states = output.reshape(*padded.input_ids.shape, -1)
        seen.append(states[padded.targets.to(states.device)])

    with on_output(lm.layout.module(lm.model, lm.layout.block_name(layer)), see):
        forward(lm.model, padded)
    return float(seen[0].float().norm(dim=-1).mean())
