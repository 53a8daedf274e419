"""What a method gets at one site, and the parts that several methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.numerics import solve
from editunlearn.numerics.route import CPU, Route

if TYPE_CHECKING:
    from editunlearn.hparams import EditorHParams


FEW = 0.25
"""Keys to keep, relative to the width, up to which an update of the inverse is cheaper than a factor of the whole."""

STEADY = 1e7
"""How far the inverse of ``C`` may be from that of its mean eigenvalue for updates to be exact enough."""

Derived = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def made_anew(_name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What is derived from a moment that has no cache."""
    return make()


@dataclass(frozen=True)
class SiteProblem:
    """One site's part of a batch of facts. Rows are keys; everything is on the CPU.

    Attributes:
        keys: (n, d_in), each fact's key, mean over its contexts.
        bare: (n, d_in), the same of the bare prompt alone.
        residuals: (n, d_out), wanted change of the site's output at each key.
        moment: second moment ``C`` (d_in, d_in), or None for the identity.
        retain: (m, d_in), keys of facts to keep; m may be 0.
        past: (p, d_in), keys of earlier edits, and what else counts like them; p may be 0.
        route: where and how it is solved.
        derived: (name, how to make it) -> tensors that depend on ``moment`` alone, from the cache where they are there.
    """

    keys: Tensor
    bare: Tensor
    residuals: Tensor
    moment: Tensor | None
    retain: Tensor
    past: Tensor
    route: Route = CPU
    derived: Derived = made_anew


def preserved(problem: SiteProblem, hp: EditorHParams) -> solve.Preserved:
    """``w C + mu K_r^T K_r + K_past^T K_past``.

    With many keys to keep the whole is factored, as it is on a GPU; else the inverse of ``C`` serves every edit of this
    model.
    """
    rows, moment = _rows_to_keep(problem, hp), problem.moment
    if moment is not None and problem.route.keeps_inverses and len(rows) <= FEW * len(moment):
        found = problem.derived("inverse", lambda: {"inverse": solve.inverse(moment)})["inverse"]
        # an update of a nearly singular term would lose all digits
        if len(rows) == 0 or float(found.diagonal().max() * moment.diagonal().double().mean()) < STEADY:
            return solve.Inverse(found, hp.moments.weight, rows)
    return solve.factor(_system(problem, hp, rows), problem.route, len(problem.keys))


def _rows_to_keep(problem: SiteProblem, hp: EditorHParams) -> Tensor:
    """Weighted keys of facts to keep and of earlier edits, float64."""
    held = len(problem.retain) if hp.retain.weight > 0 else 0
    return torch.cat([hp.retain.weight**0.5 * problem.retain[:held].double(), problem.past.double()])


def _system(problem: SiteProblem, hp: EditorHParams, rows: Tensor) -> Tensor:
    """What is preserved as one matrix, (d_in, d_in) float64 on the route's device."""
    width = problem.keys.shape[1]
    return solve.preservation(problem.moment, hp.moments.weight, rows, 1.0, dim=width, route=problem.route)


def least_squares(problem: SiteProblem, hp: EditorHParams, ridge: float) -> tuple[Tensor, Tensor]:
    """MEMIT and EMMET: left (d_out, n) and right (n, d_in), float64, for the method's ``ridge``."""
    if len(problem.keys) > problem.keys.shape[1] and ridge > 0:
        system = _system(problem, hp, _rows_to_keep(problem, hp))
        rows = solve.recognisers_of_many(problem.keys, system, ridge, hp.limits.condition, problem.route)
    else:
        term = preserved(problem, hp)
        rows = solve.recognisers(problem.keys, term, ridge, hp.limits.condition, problem.route)
    return problem.residuals.double().T, rows


def one_by_one(problem: SiteProblem, hp: EditorHParams, *, consistent: bool) -> tuple[Tensor, Tensor]:
    """ROME: a rank-one edit for each fact, each on top of the earlier ones; left (d_out, n), right (n, d_in)."""
    written = problem.keys if consistent else problem.bare
    rows = solve.rank_one(problem.keys, written, preserved(problem, hp), problem.route)
    return solve.sequential_residuals(problem.residuals, rows, written, hp.limits.condition).T, rows
