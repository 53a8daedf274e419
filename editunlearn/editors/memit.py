"""MEMIT: many facts at once over several layers, by least squares (https://arxiv.org/abs/2210.07229)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from editunlearn.hparams import EditorHParams, Real


class HParams(EditorHParams):
    """Schema of ``method: memit``."""

    method: Literal["memit"] = Field(default="memit", description="Name of the method.")
    ridge: Real = Field(
        default=1.0, ge=0, description="Slack in the constraints key -> value; 1 is MEMIT itself."
    )
    paper: str | None = Field(
        default="https://arxiv.org/abs/2210.07229", description="Where the method comes from."
    )
