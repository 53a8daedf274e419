"""R-ROME: ROME with one consistent key, which survives sequential edits (https://arxiv.org/abs/2403.07175)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from editunlearn.hparams import EditorHParams, Real


class HParams(EditorHParams):
    """Schema of ``method: r_rome``."""

    method: Literal["r_rome"] = Field(default="r_rome", description="Name of the method.")
    ridge: Real = Field(
        default=0.0, ge=0, description="Slack in the constraint key -> value; 0 makes it exact."
    )
    consistent_key: bool = Field(
        default=True,
        description="Use the mean key over contexts on both sides of the update, not the bare prompt's.",
    )
    paper: str | None = Field(
        default="https://arxiv.org/abs/2403.07175", description="Where the method comes from."
    )
