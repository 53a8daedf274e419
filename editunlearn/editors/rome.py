"""ROME: one fact, one layer, an exact constraint (https://arxiv.org/abs/2202.05262)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from editunlearn.hparams import EditorHParams, Real


class HParams(EditorHParams):
    """Schema of ``method: rome``."""

    method: Literal["rome"] = Field(default="rome", description="Name of the method.")
    ridge: Real = Field(
        default=0.0, ge=0, description="Slack in the constraint key -> value; 0 makes it exact."
    )
    consistent_key: bool = Field(
        default=False,
        description="Use the mean key over contexts on both sides of the update, not the bare prompt's.",
    )
    paper: str | None = Field(
        default="https://arxiv.org/abs/2202.05262", description="Where the method comes from."
    )
