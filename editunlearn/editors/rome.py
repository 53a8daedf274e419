"""ROME: one fact, one layer, an exact constraint (https://arxiv.org/abs/2202.05262)."""

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
    """Schema of ``method: rome``."""

    method: Literal["rome"] = Field(default="rome", description="Name of the method.")
    paper: str | None = Field(default="https://arxiv.org/abs/2202.05262", description="Where the method comes from.")


def solve(problem: SiteProblem, hp: HParams) -> tuple[Tensor, Tensor]:
    """``(v - W k) u^T / (u^T k)`` for each fact (paper, eq. 2), written one after the other."""
    from editunlearn.editors.closed_form import one_by_one

    return one_by_one(problem, hp, consistent=False)
