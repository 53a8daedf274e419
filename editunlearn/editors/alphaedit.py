"""AlphaEdit: edits confined to the null space of the keys to preserve (https://arxiv.org/abs/2410.02355)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from editunlearn.hparams import EditorHParams, Moments, NullSpace, Real


class HParams(EditorHParams):
    """Schema of ``method: alphaedit``."""

    method: Literal["alphaedit"] = Field(default="alphaedit", description="Name of the method.")
    nullspace: NullSpace = Field(
        default_factory=NullSpace, description="Which directions of the keys may change."
    )
    ridge: Real = Field(
        default=0.0, ge=0, description="Not used here: nullspace.l2 is the slack of AlphaEdit."
    )
    past_keys: bool = Field(
        default=True,
        description="Also protect the keys of earlier edits when facts are edited in several batches.",
    )
    paper: str | None = Field(
        default="https://arxiv.org/abs/2410.02355", description="Where the method comes from."
    )

    @field_validator("moments")
    @classmethod
    def _needs_second_moment(cls, moments: Moments) -> Moments:
        if moments.text == "none":
            raise ValueError(
                "moments.text cannot be 'none' here: the null space is that of C. Use 'general'."
            )
        return moments

    @field_validator("ridge")
    @classmethod
    def _ridge_stays_zero(cls, ridge: float) -> float:
        if ridge != 0.0:
            raise ValueError(f"ridge is {ridge:g}, but alphaedit does not use it. Set nullspace.l2 instead.")
        return ridge
