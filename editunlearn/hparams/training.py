"""Settings of methods that train: what, how long, beside what, until when."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from editunlearn.hparams.fields import Piece, Real, Whole

PASSAGE = 128
"""Length in tokens of a passage of general text that a trained block is held at."""


class BlockTrain(Piece):
    """How one block is trained to give the values that were found."""

    steps: Whole = Field(default=50, ge=1, description="Updates of AdamW, each on all facts and all that is kept.")
    lr: Real = Field(default=0.01, gt=0, description="Learning rate, in units of `scale`.")
    scale: Literal["relative", "absolute"] = Field(
        default="relative", description="Measure lr in units of each weight's root mean square, or in raw numbers."
    )
    weight_decay: Real = Field(default=0.0, ge=0, description="Pull back to the weights as they came.")
    kept: Real = Field(default=1.0, ge=0, description="Weight of prompts and text to keep against the facts.")


class Train(Piece):
    """How weights are trained."""

    what: Literal["full", "lora", "modules"] = Field(
        default="full",
        description="All linear maps of the blocks, a LoRA beside each of them, or those named in `modules`. "
        "Embeddings, norms and the output head stay.",
    )
    modules: list[str] = Field(
        default=[],
        description="Ends of the names of linear maps, such as mlp.down_proj: for `what: modules` those that are "
        "trained, for a LoRA those that get one; empty for a LoRA: all.",
    )
    rank: Whole = Field(default=8, ge=1, description="Rank of a LoRA.")
    alpha: Real = Field(default=16.0, gt=0, description="A LoRA counts alpha / rank times.")
    epochs: Whole = Field(default=10, ge=1, description="Times that every fact is trained on.")
    batch: Whole = Field(default=16, ge=1, description="Facts of one update.")
    lr: Real = Field(default=0.0003, gt=0, description="Learning rate of AdamW, in units of `scale`.")
    scale: Literal["relative", "absolute"] = Field(
        default="relative",
        description="Measure lr in units of each weight's root mean square, so that one number fits all models, or in "
        "raw numbers.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Whether the rate stays, or falls to 0 at the end."
    )
    warmup: Annotated[Real, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of the updates in which the rate rises from 0."
    )
    weight_decay: Real = Field(default=0.0, ge=0, description="Pull back to the weights as they came (AdamW).")
    clip: Annotated[Real, Field(gt=0)] | None = Field(
        default=1.0, description="Longest gradient of an update; longer ones are shortened to it; null: never."
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.what == "modules" and not self.modules:
            raise ValueError(
                "train.modules is []; `what: modules` needs the ends of some names, such as [mlp.down_proj]."
            )
        if self.what == "full" and self.modules:
            raise ValueError(
                f"train.modules is {self.modules!r}; with `what: full` all are trained. Set what: modules."
            )
        return self


class Stop(Piece):
    """The rule "forget at least as well as X", which makes what is kept comparable."""

    probability: Annotated[Real, Field(ge=0, le=1)] = Field(
        default=0.01,
        description="Stop when the mean probability of the true answers is at or below this; to forget as well as "
        "another run, its `forget_probability`.",
    )
    every: Whole = Field(default=1, ge=1, description="Epochs between two looks.")


class Keeping(Piece):
    """The retain term, beside what is forgotten."""

    loss: Literal["nll", "kl"] = Field(
        default="nll",
        description="Train on the true answers, or hold on to the unedited model's next-token distribution (at all "
        "tokens).",
    )
    data: Literal["facts", "text"] = Field(
        default="facts",
        description="In-distribution: the retain facts and shipped everyday facts; general: generic text.",
    )
    weight: Real = Field(default=1.0, ge=0, description="Weight against the forget term.")
    ratio: Real = Field(default=1.0, gt=0, description="Rows to keep for each fact of an update.")
    text: str = Field(default="general", min_length=1, description="For text: general (shipped), a path, or a hub id.")
    text_length: Whole = Field(default=128, ge=2, description="Length of a piece of text in tokens.")
