"""AlphaEdit: edits confined to the null space of the keys to preserve (https://arxiv.org/abs/2410.02355)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from editunlearn.hparams import EditorHParams, Moments, NullSpace

if TYPE_CHECKING:
    from torch import Tensor

    from editunlearn.editors.closed_form import SiteProblem
    from editunlearn.numerics.projector import Projector

DEFAULT_LAYERS = (0.06, 0.12, 0.18, 0.24)
"""Depths of the edited blocks for ``layers: auto``, 0 the first and 1 the last."""


class HParams(EditorHParams):
    """Schema of ``method: alphaedit``."""

    method: Literal["alphaedit"] = Field(default="alphaedit", description="Name of the method.")
    nullspace: NullSpace = Field(default_factory=NullSpace, description="Which directions of the keys may change.")
    paper: str | None = Field(default="https://arxiv.org/abs/2410.02355", description="Where the method comes from.")

    @field_validator("moments")
    @classmethod
    def _needs_second_moment(cls, moments: Moments) -> Moments:
        if moments.text == "none":
            raise ValueError("moments.text cannot be 'none' here: the null space is that of C. Use 'general'.")
        return moments


def solve(problem: SiteProblem, hp: HParams) -> tuple[Tensor, Tensor]:
    """``R K^T P (K_p K_p^T P + K K^T P + l2 I)^-1`` (paper, eq. 14) on projected keys.

    Retained facts take part twice: they are added to the moment whose null space is taken (``retain.weight`` against
    ``moments.weight``), and what of their keys lies in the null space all the same counts as keys already written. With
    ``nullspace.soft`` the same is true of text: a direction below the threshold is not free of charge, only cheaper.
    """
    import torch

    from editunlearn.numerics import solve

    project = _null_space(problem, hp)
    held = torch.cat([problem.past, hp.retain.weight**0.5 * problem.retain])
    text = None
    if hp.nullspace.soft and problem.moment is not None:
        text = solve.preservation(problem.moment, hp.moments.weight, route=problem.route)
    rows = solve.projected_recognisers(
        problem.keys, project, hp.nullspace.l2, held, text, hp.limits.condition, problem.route
    )
    return problem.residuals.double().T, rows


def _null_space(problem: SiteProblem, hp: HParams) -> Projector:
    from editunlearn.numerics import projector, solve

    share = hp.retain.weight / hp.moments.weight
    nullspace, route = hp.nullspace, problem.route

    def make() -> dict[str, Tensor]:
        moment = solve.preservation(problem.moment, 1.0, problem.retain, share, dim=problem.keys.shape[1], route=route)
        found = projector.null_space(moment, nullspace.threshold, relative=nullspace.relative, route=route)
        return {"removed" if found.removes else "left": found.basis}

    own = share > 0 and len(problem.retain) > 0  # facts to keep take part: it serves this request alone
    kind = "relative" if hp.nullspace.relative else "absolute"
    kept = make() if own else problem.derived(f"null-space-{hp.nullspace.threshold}-{kind}", make)
    return projector.Projector(next(iter(kept.values())).to(route.device), "removed" in kept)
