"""R-ROME: ROME with one consistent key, which survives sequential edits (https://arxiv.org/abs/2403.07175)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from editunlearn.hparams import EditorHParams

if TYPE_CHECKING:
    from torch import Tensor

    from editunlearn.editors.closed_form import SiteProblem

DEFAULT_LAYERS = (0.18,)
"""Depths of the edited blocks for ``layers: auto``, 0 the first and 1 the last."""


class HParams(EditorHParams):
    """Schema of ``method: r_rome``."""

    method: Literal["r_rome"] = Field(default="r_rome", description="Name of the method.")
    paper: str | None = Field(default="https://arxiv.org/abs/2403.07175", description="Where the method comes from.")


def solve(problem: SiteProblem, hp: HParams) -> tuple[Tensor, Tensor]:
    """ROME's update with the mean key over contexts on both sides, one fact after the other."""
    from editunlearn.editors.closed_form import one_by_one

    return one_by_one(problem, hp, consistent=True)
