"""WISE: side memories of one late layer, read by sequences that wake them (https://arxiv.org/abs/2405.14768)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from editunlearn.hparams import MemoryHParams, Piece, Real, Whole

if TYPE_CHECKING:
    from editunlearn.editors.memory_flow import Fitted, Stage

DEFAULT_LAYERS = (0.85,)
"""Depth of the edited block for ``layers: auto``."""


class Side(Piece):
    """How a side memory, an update of the layer's weight W, is trained."""

    steps: Whole = Field(default=180, ge=1, description="Most steps for each group of facts.")
    lr: Real = Field(default=0.1, gt=0, description="Size of a step, in units of `scale`.")
    scale: Literal["relative", "absolute"] = Field(
        default="relative",
        description="Adam, with lr and clamp in units of the root mean square of W; or as published plain gradient "
        "descent in raw numbers.",
    )
    clamp: Annotated[Real, Field(gt=0)] | None = Field(
        default=4.0, description="Largest change of an entry of W, in units of `scale`; null for no limit."
    )
    weight_decay: Real = Field(default=0.0, ge=0, description="Share of the update that each step of size 1 takes off.")
    mask: Annotated[Real, Field(gt=0, le=1)] = Field(
        default=0.2, description="Share of the entries of W, chosen at random for each shard, that are trained."
    )
    contexts: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=2, description="Contexts per fact and step: the bare prompt and others in turn; null: all at each."
    )
    share: Annotated[Real, Field(gt=0, le=1)] = Field(
        default=0.25, description="Share of the prompts and passages to keep that a step sees; all have their turn."
    )
    batch: Whole = Field(default=25, ge=1, description="Facts that are trained together; others of the shard follow.")
    learned: Real = Field(
        default=0.05,
        ge=0,
        description="When the loss of the targets is at or below this, steps are made by the margins alone, which take "
        "longer to reach and cost a seventh, and the targets are looked at every `rest` steps.",
    )
    rest: Whole = Field(default=4, ge=1, description="See `learned`; as published 1: at every step.")
    stop_loss: Real = Field(default=0.02, ge=0, description="A group is done when its whole loss is at or below this.")


class Margin(Piece):
    """What tells edited prompts from others: how much the memory does to them."""

    outside: Real = Field(default=0.1, ge=0, description="Most that it shall do to a prompt to keep (alpha).")
    inside: Real = Field(default=0.5, gt=0, description="Least that it shall do to an edited prompt (beta).")
    gap: Real = Field(default=0.3, ge=0, description="Least difference between the two (gamma).")
    scale: Literal["relative", "absolute"] = Field(
        default="relative", description="Measure them in norms of the layer's own output, or in raw numbers."
    )
    weight: Real = Field(default=3.0, gt=0, description="Weight against the loss of the targets.")


class Shards(Piece):
    """How the facts are divided."""

    size: Whole = Field(default=25, ge=1, description="Facts that are trained under one mask.")
    per_memory: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=1, description="Shards that are merged into one memory; null: all into one, nothing is retrieved."
    )
    merge: Literal["ties", "magnitude", "linear"] = Field(
        default="ties",
        description="Mean of the entries that agree in sign with their sum, of the largest entries, or of all.",
    )
    density: Annotated[Real, Field(gt=0, le=1)] = Field(
        default=0.53, description="Share of a shard's entries that counts for ties and magnitude."
    )
    repair: Whole = Field(
        default=20,
        ge=0,
        description="Most steps on all facts of a memory after its shards were merged, which costs some of them; as "
        "published 0.",
    )


class Routing(Piece):
    """When a sequence goes through a memory."""

    window: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=40,
        description="Of a prompt, the last so many tokens are looked at; null: all, as published.",
    )
    tokens: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=4,
        description="Of these the so many that a memory does most to: what stands before a question does not hide it; "
        "null: the mean over all, as published.",
    )
    ratio: Annotated[Real, Field(gt=0, le=1)] = Field(
        default=0.8, description="Threshold, as a share of the least that the memory does to a prompt it is for."
    )
    clear: Annotated[Real, Field(ge=0, le=1)] | None = Field(
        default=0.5,
        description="Nor is it below this share of the way there from the most done to a prompt to keep; null: it may.",
    )


class HParams(MemoryHParams):
    """Schema of ``method: wise``."""

    method: Literal["wise"] = Field(default="wise", description="Name of the method.")
    side: Side = Field(default_factory=Side, description="How a memory is trained.")
    margin: Margin = Field(default_factory=Margin, description="What it does to which prompts.")
    shards: Shards = Field(default_factory=Shards, description="How the facts are divided over memories.")
    routing: Routing = Field(default_factory=Routing, description="When a memory is read.")
    paper: str | None = Field(default="https://arxiv.org/abs/2405.14768", description="Where the method comes from.")

    @property
    def training_steps(self) -> int:
        """Times that a fact is trained on, at most."""
        return self.side.steps + self.shards.repair

    @property
    def contexts_per_step(self) -> int | None:
        """In how many contexts a step sees a fact; None: in all."""
        return self.side.contexts


def size(hp: HParams, facts: int, shape: tuple[int, int]) -> int:
    """Bytes of the memories."""
    shards = -(-facts // hp.shards.size)
    return 4 * shape[0] * shape[1] * -(-shards // (hp.shards.per_memory or max(1, shards)))


def fit(stage: Stage[HParams]) -> Fitted:
    """A masked update for each shard of the facts, merged, with the threshold that wakes it."""
    from editunlearn.editors import side

    return side.fit(stage)
