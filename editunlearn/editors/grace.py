"""GRACE: a codebook beside one layer; the weights stay as they are (https://arxiv.org/abs/2211.11031)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from editunlearn.hparams import MemoryHParams, Piece, Real, Whole

if TYPE_CHECKING:
    from editunlearn.editors.memory_flow import Fitted, Stage

DEFAULT_LAYERS = (0.6,)
"""Depth of the edited block for ``layers: auto``: late enough to know the prompt, with blocks behind it that can make
several words of one value."""


class Radius(Piece):
    """How far from a fact's prompt another one may be, at the layer's input, to be taken for it."""

    start: Real = Field(default=0.3, gt=0, description="Radius of a new ball, in units of `scale`.")
    scale: Literal["relative", "absolute"] = Field(
        default="relative", description="Measure it in norms of the ball's own key, or in raw numbers."
    )
    clear: Annotated[Real, Field(gt=0, le=1)] | None = Field(
        default=0.5, description="No ball reaches further than this share of the way to a prompt to keep; null: it may."
    )


class MemoryValue(Piece):
    """How the value of an entry, which replaces the layer's output, is optimised."""

    steps: Whole = Field(default=40, ge=1, description="Most updates of Adam.")
    lr: Real = Field(default=0.3, gt=0, description="Learning rate of Adam, in units of `scale`.")
    scale: Literal["relative", "absolute"] = Field(
        default="relative", description="Measure lr in units of the output's own scale, or in raw numbers."
    )
    start: Literal["warm", "cold"] = Field(
        default="warm", description="Begin with the output as it is, or with random numbers from 0 to 1."
    )
    clamp: Annotated[Real, Field(gt=0)] | None = Field(
        default=4.0, description="Longest change of the output, as a multiple of its norm; null for no limit."
    )
    weight_decay: Real = Field(default=0.0, ge=0, description="Weight of the squared relative norm of the change.")
    stop_loss: Real = Field(default=0.02, ge=0, description="A value is done when its loss falls below this.")


class HParams(MemoryHParams):
    """Schema of ``method: grace``."""

    method: Literal["grace"] = Field(default="grace", description="Name of the method.")
    radius: Radius = Field(default_factory=Radius, description="How large the balls are.")
    conflict: Literal["fact", "target"] = Field(
        default="fact",
        description="What gives way to each other when balls meet: different facts, or as published different targets "
        "(facts with one target, such as one refusal for all, then share balls that grow over what is between them).",
    )
    where: Literal["last", "prompt", "all"] = Field(
        default="prompt",
        description="Outputs that are replaced: at the prompt's last token, at all of its tokens, or at all tokens, "
        "the answer's too.",
    )
    value: MemoryValue = Field(default_factory=MemoryValue, description="How the values are optimised.")
    paper: str | None = Field(default="https://arxiv.org/abs/2211.11031", description="Where the method comes from.")

    @property
    def training_steps(self) -> int:
        """Times that a fact is trained on, at most."""
        return self.value.steps


def size(hp: HParams, facts: int, shape: tuple[int, int]) -> int:
    """Bytes of the codebook, about: an entry for each fact."""
    return 4 * facts * (sum(shape) + 1)


def fit(stage: Stage[HParams]) -> Fitted:
    """Balls around the facts' prompts, then a value for each ball."""
    from editunlearn.editors import codebook

    return codebook.fit(stage)
