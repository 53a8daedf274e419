"""EMMET: many facts at once under (nearly) exact constraints (https://arxiv.org/abs/2403.14236)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from editunlearn.hparams import EditorHParams, Real


class HParams(EditorHParams):
    """Schema of ``method: emmet``."""

    method: Literal["emmet"] = Field(default="emmet", description="Name of the method.")
    ridge: Real = Field(
        default=0.1, ge=0, description="Slack in the constraints key -> value; 0 is exact, 1 would be MEMIT."
    )
    paper: str | None = Field(
        default="https://arxiv.org/abs/2403.14236", description="Where the method comes from."
    )
