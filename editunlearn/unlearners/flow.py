"""From settings to a delta: what is trained, the rows, the loop, the change. The model is only read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from editunlearn.deltas.build import check_norm, make_delta
from editunlearn.deltas.changes import Changes
from editunlearn.deltas.dense import make_dense
from editunlearn.deltas.files import save
from editunlearn.deltas.lowrank import Dense, Factors
from editunlearn.errors import NumericalError
from editunlearn.lm import room
from editunlearn.lm.weights import shape
from editunlearn.unlearners import cost, parameters, probe
from editunlearn.unlearners.passes import Passes
from editunlearn.unlearners.training import Diverged, Training

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.dense import DenseDelta
    from editunlearn.deltas.lowrank import LowRankDelta
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.hparams import UnlearnerHParams
    from editunlearn.lm.loading import LM
    from editunlearn.unlearners.parameters import Trained
    from editunlearn.workspace import Workspace

LAST_GOOD = "last_good"
"""Folder in a workspace with the delta of a training that diverged, as it was before that."""


def settled(lm: LM, hp: UnlearnerHParams, work: Workspace, console: Console) -> UnlearnerHParams:
    """``hp`` with a number in place of ``batch_tokens: auto``: what is trained has its own memory beside the batches.

    Raises:
        InputError: blocks or modules that the model does not have.
    """
    names, _ = parameters.trained_modules(lm.model, lm.layout, hp)
    held = cost.nbytes(hp, [shape(lm.model, name) for name in names], lm.dtype.itemsize)
    layers = [lm.layout.layer_of(name) for name in names]
    weights = () if hp.train.what == "lora" else names
    return room.settled(lm, hp, layers, work, console, trained=weights, held=held)


def run(
    lm: LM,
    request: ForgetRequest,
    hp: UnlearnerHParams,
    work: Workspace,
    console: Console,
    about: Mapping[str, Any],
) -> LowRankDelta | DenseDelta:
    """Train, and give what was learned a manifest.

    Args:
        about: what the manifest says, as for :func:`deltas.build.make_delta`.
    """
    names, why = parameters.trained_modules(lm.model, lm.layout, hp)
    console.info(f"trained: {len(names)} matrices ({why})")
    objective = hp.objective(lm, request)
    wanted = {"forget", *(name for term in objective.terms for name in term.pools)}
    pools = {name: make() for name, make in objective.pools.items() if name in wanted}
    where = probe.masks(lm, names, pools, hp, console)
    trained = parameters.of(lm, [n for n in names if where is None or n in where], hp.train, hp.seed)
    probe.begin(lm, trained, pools, hp, where, console)
    masks = where if where is not None and isinstance(trained, Changes) else {}
    passes = Passes(lm, trained, pools, hp.tokens_at_once)
    training = Training(passes, trained, objective.terms, hp, work, console, masks)
    try:
        training.run()
    except Diverged as error:
        raise NumericalError(_kept(error, lm, hp, trained, work, about)) from error
    delta = delta_of(lm, hp.finished(trained.updates()), about)
    check_norm(delta, hp.limits.norm)
    return delta


def delta_of(
    lm: LM, updates: Mapping[str, Dense] | Mapping[str, Factors], about: Mapping[str, Any]
) -> LowRankDelta | DenseDelta:
    """What was learned, with a manifest."""
    dense = {name: update for name, update in updates.items() if isinstance(update, Dense)}
    if dense:
        return make_dense(lm, dense, **about)
    factors = {name: update for name, update in updates.items() if isinstance(update, Factors)}
    shared: dict[str, list[str | None]] = {name: [None] * found.rank for name, found in factors.items()}
    return make_delta(lm, factors, columns=shared, **about)


def _kept(
    error: Diverged, lm: LM, hp: UnlearnerHParams, trained: Trained, work: Workspace, about: Mapping[str, Any]
) -> str:
    """What to say of a training that diverged, with its last good state saved if there is where."""
    if error.good is None:
        return f"{error.reason} Nothing was learned before that, and nothing was written."
    if work.folder is None:
        return f"{error.reason} Nothing was written."
    for name, value in trained.values.items():
        value.data.copy_(error.good[name])
    where = work.folder / LAST_GOOD
    save(delta_of(lm, hp.finished(trained.updates()), about), where)
    return (
        f"{error.reason} What it was after update {error.updates}, which was still well, is the delta {where}: "
        f"look at it with editunlearn evaluate --delta {where}."
    )
