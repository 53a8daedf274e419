"""What a method gets at one site, and the parts that several methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.numerics import solve

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
        derived: (name, how to make it) -> tensors that depend on ``moment`` alone, from the cache where they are there.
    """

    keys: Tensor
    bare: Tensor
    residuals: Tensor
    moment: Tensor | None
    retain: Tensor
    past: Tensor
    derived: Derived = made_anew


def preserved(problem: SiteProblem, hp: EditorHParams) -> solve.Preserved:
    """``w C + mu K_r^T K_r + K_past^T K_past``.

    With many keys to keep the whole is factored; else the inverse of ``C`` serves every edit of this model.
    """
    rows = _rows_to_keep(problem, hp)
    if problem.moment is not None and len(rows) <= FEW * len(problem.moment):
        moment = problem.moment.double()
        found = problem.derived("inverse", lambda: {"inverse": solve.inverse(moment)})["inverse"]
        # an update of a nearly singular term would lose all digits
        if len(rows) == 0 or float(found.diagonal().max() * moment.diagonal().mean()) < STEADY:
            return solve.Inverse(found, hp.moments.weight, rows)
    return solve.factor(_system(problem, hp))


def _rows_to_keep(problem: SiteProblem, hp: EditorHParams) -> Tensor:
    """Weighted keys of facts to keep and of earlier edits, float64."""
    held = len(problem.retain) if hp.retain.weight > 0 else 0
    return torch.cat([hp.retain.weight**0.5 * problem.retain[:held].double(), problem.past.double()])


def _system(problem: SiteProblem, hp: EditorHParams) -> Tensor:
    """What is preserved as one matrix, (d_in, d_in) float64."""
    rows = _rows_to_keep(problem, hp)
    system = solve.preservation(problem.moment, hp.moments.weight, dim=problem.keys.shape[1])
    return system + rows.T @ rows


def least_squares(problem: SiteProblem, hp: EditorHParams, ridge: float) -> tuple[Tensor, Tensor]:
    """MEMIT and EMMET: left (d_out, n) and right (n, d_in), float64, for the method's ``ridge``."""
    if len(problem.keys) > problem.keys.shape[1] and ridge > 0:
        rows = solve.recognisers_of_many(problem.keys, _system(problem, hp), ridge, hp.limits.condition)
        return problem.residuals.double().T, rows
    rows = solve.recognisers(problem.keys, preserved(problem, hp), ridge, hp.limits.condition)
    return problem.residuals.double().T, rows


def one_by_one(problem: SiteProblem, hp: EditorHParams, *, consistent: bool) -> tuple[Tensor, Tensor]:
    """ROME: a rank-one edit for each fact, each on top of the earlier ones; left (d_out, n), right (n, d_in)."""
    term = preserved(problem, hp)
    written = problem.keys if consistent else problem.bare
    rows = torch.cat([solve.rank_one(m, k, term) for m, k in zip(problem.keys, written, strict=True)])
    return solve.sequential_residuals(problem.residuals, rows, written, hp.limits.condition).T, rows
