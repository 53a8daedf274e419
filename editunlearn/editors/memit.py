"""MEMIT: many facts at once over several layers, by least squares (https://arxiv.org/abs/2210.07229)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from editunlearn.hparams import EditorHParams, Real

if TYPE_CHECKING:
    from torch import Tensor

    from editunlearn.editors.closed_form import SiteProblem

DEFAULT_LAYERS = (0.06, 0.12, 0.18, 0.24)
"""Depths of the edited blocks for ``layers: auto``, 0 the first and 1 the last."""


class HParams(EditorHParams):
    """Schema of ``method: memit``."""

    method: Literal["memit"] = Field(default="memit", description="Name of the method.")
    ridge: Real = Field(default=1.0, ge=0, description="Slack in the constraints key -> value; 1 is MEMIT itself.")
    paper: str | None = Field(default="https://arxiv.org/abs/2210.07229", description="Where the method comes from.")


def solve(problem: SiteProblem, hp: HParams) -> tuple[Tensor, Tensor]:
    """``dW = R (w C + K K^T)^-1``-weighted least squares over the batch (paper, eq. 14), in its dual form."""
    from editunlearn.editors.closed_form import least_squares

    return least_squares(problem, hp, hp.ridge)
