"""Fitting a codebook: what balls the facts' prompts make, and what each ball's value is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.deltas.codebook import Codebook
from editunlearn.editors import keys, values
from editunlearn.editors.memory_flow import Fitted, Stage
from editunlearn.editors.value_types import Problem, Replacing, Store
from editunlearn.hparams.pieces import OneValue
from editunlearn.lm.weights import shape
from editunlearn.numerics.codebook import Balls, balls, clear_of

if TYPE_CHECKING:
    from editunlearn.editors.grace import HParams
    from editunlearn.lm.tokens import Row

REACH = 1.001
"""A ball that grew to reach a key holds it with this much to spare: the same prompt in another batch rounds
differently."""


def fit(stage: Stage[HParams]) -> Fitted:
    """Balls of all bare prompts first, then of the prefixed ones, which mostly join them; then a value for each ball.

    What a ball holds is known before any value is, as no value changes a key. So a value is made of all rows of its
    ball at once, and the order of the facts matters only where balls meet.
    """
    hp, lm = stage.hp, stage.lm
    order = [(fact, context) for context in range(len(stage.rows[0])) for fact in range(len(stage.rows))]
    rows = [stage.rows[fact][context] for fact, context in order]
    found = keys.collect(lm, rows, [stage.site], warn=stage.console.warn)[stage.site.name]
    labels = [stage.facts[fact].id if hp.conflict == "fact" else _target(stage, fact) for fact, _ in order]
    unit = found.double().norm(dim=1) if hp.radius.scale == "relative" else torch.ones(len(found))
    made = balls(found, labels, hp.radius.start * unit)
    centres = found[made.centres]
    radii = REACH * made.radii
    if hp.radius.clear is not None and (stage.keep or stage.texts):
        kept = keys.collect(lm, [*stage.keep, *stage.texts], [stage.site], warn=stage.console.warn)[stage.site.name]
        radii = clear_of(radii, centres, kept, hp.radius.clear)
    _tell(stage, made, radii, order)
    value = _values(stage, made, rows)
    facts = [[order[i][0] for i, ball in enumerate(made.members) if ball == b] for b in range(len(made.centres))]
    entries = [tuple(stage.facts[fact].id for fact in dict.fromkeys(own)) for own in facts]
    return Fitted(Codebook(centres, value, radii.float(), hp.where), entries)


def _target(stage: Stage[HParams], fact: int) -> tuple[int, ...]:
    """Token ids of what a fact's prompt is to get: these, and not their mean, say whether two targets are one."""
    bare = stage.rows[fact][0]
    return bare.ids[bare.prompt_length :]


def _values(stage: Stage[HParams], made: Balls, rows: list[Row]) -> Tensor:
    """(balls, d_out) float32."""
    hp = stage.hp.value
    problems = [
        Problem(tuple(rows[i] for i, ball in enumerate(made.members) if ball == number))
        for number in range(len(made.centres))
    ]
    settings = OneValue(
        steps=hp.steps,
        lr=hp.lr,
        scale=hp.scale,
        clamp=hp.clamp,
        weight_decay=hp.weight_decay,
        kl=0.0,
        stop_loss=hp.stop_loss,
    )
    start = None
    if hp.start == "cold":
        width = shape(stage.lm.model, stage.site.name)[0]
        start = torch.rand(len(problems), 1, width, generator=torch.Generator().manual_seed(stage.hp.seed))
    with stage.console.progress(len(problems), "values (entries)") as bar:
        found = values.optimise(
            stage.lm,
            problems,
            [stage.site.name],
            settings,
            replacing=Replacing(stage.hp.where, start),
            tokens=stage.hp.tokens_at_once,
            store=Store(stage.work),
            progress=bar.update,
            warn=stage.console.warn,
        )
    hard = int((found.loss > 1).sum())
    if hard:
        stage.console.warn(
            f"{hard} of {len(problems)} values did not converge (loss above 1); try more value.steps, an earlier "
            "layer, or where=prompt"
        )
    return (found.clean + found.change)[:, 0].contiguous()


def _tell(stage: Stage[HParams], made: Balls, radii: Tensor, order: list[tuple[int, int]]) -> None:
    contexts = len(order) // len(stage.facts)
    stage.console.info(
        f"codebook: {len(made.centres)} entries for {len(stage.facts)} facts in {contexts} contexts; "
        f"median radius {float(radii.median()):.3g}"
    )
