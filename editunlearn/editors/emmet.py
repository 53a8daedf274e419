"""EMMET: many facts at once under (nearly) exact constraints (https://arxiv.org/abs/2403.14236)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from editunlearn.hparams import EditorHParams, Real

if TYPE_CHECKING:
    from torch import Tensor

    from editunlearn.editors.closed_form import SiteProblem

DEFAULT_LAYERS = (0.18,)
"""Depths of the edited blocks for ``layers: auto``, 0 the first and 1 the last."""


class HParams(EditorHParams):
    """Schema of ``method: emmet``."""

    method: Literal["emmet"] = Field(default="emmet", description="Name of the method.")
    ridge: Real = Field(
        default=0.1, ge=0, description="Slack in the constraints key -> value; 0 is exact, 1 would be MEMIT."
    )
    paper: str | None = Field(default="https://arxiv.org/abs/2403.14236", description="Where the method comes from.")


def solve(problem: SiteProblem, hp: HParams) -> tuple[Tensor, Tensor]:
    """Equality-constrained batch edit (paper, eq. 10) with ``ridge`` on the inner system; the same solver as MEMIT."""
    from editunlearn.editors.closed_form import least_squares

    return least_squares(problem, hp, hp.ridge)
