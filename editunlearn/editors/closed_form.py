"""What a method gets at one site, and the parts that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.numerics import solve

if TYPE_CHECKING:
    from editunlearn.hparams import EditorHParams


@dataclass(frozen=True)
class SiteProblem:
    """One site's part of a batch of facts. Rows are keys; everything is on the CPU.

    Attributes:
        keys: (n, d_in), each fact's key, mean over its contexts.
        bare: (n, d_in), the same of the bare prompt alone.
        residuals: (n, d_out), wanted change of the site's output at each key.
        moment: second moment ``C`` (d_in, d_in), or None for the identity.
        retain: (m, d_in), keys of facts to keep; m may be 0.
        past: (p, d_in), keys of earlier edits; p may be 0.
    """

    keys: Tensor
    bare: Tensor
    residuals: Tensor
    moment: Tensor | None
    retain: Tensor
    past: Tensor


def preservation_factor(problem: SiteProblem, hp: EditorHParams) -> Tensor:
    """Cholesky factor of ``w C + mu K_r^T K_r + K_past^T K_past``."""
    system = solve.preservation(
        problem.moment, hp.moments.weight, problem.retain, hp.retain.weight, dim=problem.keys.shape[1]
    )
    past = problem.past.double()
    return solve.factor(system + past.T @ past)


def least_squares(problem: SiteProblem, hp: EditorHParams, ridge: float) -> tuple[Tensor, Tensor]:
    """MEMIT and EMMET: left (d_out, n) and right (n, d_in), float64, for the method's ``ridge``."""
    rows = solve.recognisers(problem.keys, preservation_factor(problem, hp), ridge)
    return problem.residuals.double().T, rows


def one_by_one(problem: SiteProblem, hp: EditorHParams, *, consistent: bool) -> tuple[Tensor, Tensor]:
    """ROME: a rank-one edit for each fact, each on top of the earlier ones; left (d_out, n), right (n, d_in)."""
    lower = preservation_factor(problem, hp)
    written = problem.keys if consistent else problem.bare
    rows = torch.cat([solve.rank_one(m, k, lower) for m, k in zip(problem.keys, written, strict=True)])
    return solve.sequential_residuals(problem.residuals, rows, written).T, rows
