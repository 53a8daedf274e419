"""UnKE: one block is trained until it gives the values of unstructured text (https://arxiv.org/abs/2405.15349)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from editunlearn.hparams import BlockHParams

DEFAULT_LAYERS = (0.22,)
"""Depth of the trained block for ``layers: auto``; published: the seventh of 28 or 32."""


class HParams(BlockHParams):
    """Schema of ``method: unke``."""

    method: Literal["unke"] = Field(default="unke", description="Name of the method.")
    paper: str | None = Field(default="https://arxiv.org/abs/2405.15349", description="Where the method comes from.")
