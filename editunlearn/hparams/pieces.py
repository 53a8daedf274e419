"""Groups of settings that several methods share, each a frozen schema."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from editunlearn.hparams.fields import BatchTokens, Piece, Prompts, Real, Steps, Strength, Tokens, Whole

BATCH_TOKENS, REFINE_BATCH_TOKENS = 2048, 1024
"""Tokens of a batch when they are ``auto`` on a CPU with room for them."""


def batches(usual: int, what: str) -> str:
    """Description of a number of tokens that may be ``auto``."""
    return (
        f"Tokens {what} at a time; changes memory, not results. auto: {usual:,} on a CPU, less where memory is short; "
        "on a GPU as many as fit."
    )


class ContextPrefixes(Piece):
    """Random texts that the model itself writes; the bare prompt always counts too."""

    count: Whole = Field(default=5, ge=0, description="How many prefixes besides the bare prompt.")
    tokens: Whole = Field(default=10, ge=1, description="Length of a prefix in tokens.")
    seed: Whole = Field(default=0, ge=0, description="Seed of the sampling.")


class OneValue(Piece):
    """How the value of a fact (the vector that makes the model say the target) is optimised."""

    steps: Whole = Field(default=20, ge=1, description="Most updates of Adam per fact.")
    lr: Real = Field(default=0.3, gt=0, description="Learning rate of Adam, in units of `scale`.")
    scale: Literal["relative", "absolute"] = Field(
        default="relative",
        description="Measure lr in units of the activation's own scale, or in raw numbers.",
    )
    clamp: Annotated[Real, Field(gt=0)] | None = Field(
        default=4.0,
        description="Longest change, as a multiple of the clean activation's norm; null for no limit.",
    )
    weight_decay: Real = Field(default=0.05, ge=0, description="Weight of the penalty on the size of the change.")
    penalty: Literal["squared", "norm"] = Field(
        default="squared",
        description="Penalise the squared relative norm, or as published norm over squared norm.",
    )
    kl: Real = Field(default=0.0625, ge=0, description="Weight of the KL divergence to the unedited model.")
    kl_on: Literal["prompts", "subject"] = Field(
        default="prompts",
        description="Measure it at the end of retain prompts that are given the fact's subject, "
        "or as published at the last token of the subject, before its relation is known.",
    )
    contexts: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=None, description="Contexts a value is optimised in, the bare prompt first; null for all."
    )
    stop_loss: Real = Field(default=0.05, ge=0, description="A fact is done when its loss falls below this.")


class Value(OneValue):
    """The same where the work may be divided over several layers."""

    spread: Literal["joint", "residual"] = Field(
        default="joint",
        description="Split the work over the layers jointly, or as published by what is still missing.",
    )


LEAST_TOKENS, TOKENS_PER_DIMENSION = 40_000, 10
"""Tokens of a second moment when they are ``auto``: what is fewer than its width says nothing of some directions."""


class Moments(Piece):
    """The second moment C of the keys over text: what the edit has to leave alone."""

    text: str = Field(
        default="general",
        min_length=1,
        description="Text to read: general (shipped), a path, hub id:config:split, or none (C = identity).",
    )
    tokens: Tokens = Field(
        default="auto",
        description="How many tokens of that text to read; auto: "
        f"{TOKENS_PER_DIMENSION} for each dimension of the keys, at least {LEAST_TOKENS:,}.",
    )
    length: Whole = Field(default=256, ge=2, description="Length of the packed sequences in tokens.")
    weight: Real = Field(default=10000.0, gt=0, description="Weight of C against the keys of the facts.")

    def budget(self, width: int) -> int:
        """Tokens to read for keys of that many dimensions."""
        return max(LEAST_TOKENS, TOKENS_PER_DIMENSION * width) if self.tokens == "auto" else self.tokens


class Retain(Piece):
    """Preservation built from retain facts rather than from general text."""

    weight: Real = Field(default=10.0, ge=0, description="Weight of the retain keys; 0 leaves them out.")
    max_keys: Whole = Field(default=4000, ge=1, description="Most retain keys to use; more are sampled down.")
    lookalikes: Whole = Field(
        default=0,
        ge=0,
        description="Tokens of moments.text taken most for a forgotten subject; their keys are kept like retain keys.",
    )


class NullSpace(Piece):
    """Which directions count as unused by the keys to preserve."""

    threshold: Real = Field(default=0.04, gt=0, description="Directions of C with less energy than this are free.")
    relative: bool = Field(default=True, strict=True, description="Measure the threshold against the mean eigenvalue.")
    l2: Real = Field(default=1.0, gt=0, description="Weight of the norm of the update.")
    soft: bool = Field(
        default=False,
        strict=True,
        description="Let C count in the free directions too, with moments.weight, as in MEMIT. As published: false.",
    )


class Solve(Piece):
    """How the closed form's systems are solved."""

    precision: Literal["auto", "float64", "refined"] = Field(
        default="auto",
        description="refined: factored in float32 and refined to float64. auto: that on GPUs with slow float64, for "
        "few facts; else float64.",
    )


class Merge(Piece):
    """Facts that share a value, and perhaps a key (query merging); null: each has its own."""

    by: Literal["subject", "key", "run", "all"] = Field(
        default="subject",
        description="What goes together: facts about one subject, facts with similar keys, so many in a row, or all.",
    )
    size: Whole = Field(
        default=10,
        ge=2,
        description="Facts of a group, at most (key: on average); all: so many of them are optimised on.",
    )
    keys: Literal["sample", "group"] = Field(
        default="sample", description="A key for each fact, or one for each group: the mean."
    )


class Chunks(Piece):
    """Targets written chunk by chunk (AnyEdit), each chunk with a value and a key; null: each target in one."""

    size: Whole = Field(default=40, ge=1, description="Length of a chunk in tokens.")
    preserve: Real = Field(
        default=1.0,
        ge=0,
        description="Weight of the keys of all other tokens of prompt and target, which nothing is written at; "
        "0 leaves them out.",
    )


LEAST_STEPS, STEPS_PER_FACT = 40, 5
"""Steps of refine when they are ``auto``: the more facts there are to tell apart, the more."""

OWN_TARGETS = 3
"""Times as many when the facts have different targets: each is learned token by token, and none helps another."""


PROMPTS_PER_FACT, LEAST_PROMPTS, MOST_PROMPTS = 1.6, 32, 64
"""Prompts to keep in each step of refine when they are ``auto``. Many facts disturb more, and of few prompts the
gradient is noisy: what is kept suffers from that, not what is forgotten."""

KL_PER_FACT, LEAST_KL, MOST_KL = 3.0, 80.0, 120.0
"""Weight of the KL divergence on prompts to keep when it is ``auto``: many facts disturb more, and each has the less of
the gradient, whose direction alone counts."""


class Refine(Piece):
    """Training of the left factors after the closed form, on what is wanted; the right factors stay."""

    steps: Steps = Field(
        default="auto",
        description=f"Updates of Adam; auto: {LEAST_STEPS}, or {STEPS_PER_FACT} a fact less {2 * LEAST_STEPS} if more, "
        f"{OWN_TARGETS} times as many when they have different targets, and up to as many again while facts are not "
        "learned.",
    )
    lr: Real = Field(
        default=0.05,
        gt=0,
        description="Size of a step, relative to the left factors that would write the whole change.",
    )
    kl: Strength = Field(
        default="auto",
        description="Weight of the KL divergence on prompts to keep; "
        f"auto: {KL_PER_FACT:.0f} a fact, {LEAST_KL:.0f} to {MOST_KL:.0f}.",
    )
    text_kl: Real = Field(default=60.0, ge=0, description="Weight of the KL divergence on generic text.")
    kept_keys: Real = Field(
        default=0.1, ge=0, description="Weight of the change at all keys to keep, relative to that of the closed form."
    )
    floor: Real = Field(default=0.6, ge=0, description="A target whose loss is at or below this no longer counts.")
    forget_batch: Whole = Field(default=20, ge=1, description="Facts to forget per step.")
    contexts: Whole = Field(default=2, ge=1, description="Contexts per fact and step: the bare prompt and others.")
    retain_batch: Prompts = Field(
        default="auto",
        description=f"Prompts to keep per step; auto: {PROMPTS_PER_FACT} a fact, {LEAST_PROMPTS} to {MOST_PROMPTS}.",
    )
    text_batch: Whole = Field(default=1, ge=1, description="Sequences of generic text per step.")
    text_length: Whole = Field(default=128, ge=2, description="Length of those sequences in tokens.")
    batch_tokens: BatchTokens = Field(default="auto", description=batches(REFINE_BATCH_TOKENS, "in memory"))

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens of one batch; the usual number where ``auto`` was not settled for a model."""
        return REFINE_BATCH_TOKENS if self.batch_tokens == "auto" else self.batch_tokens

    def planned(self, facts: int, targets: int = 1) -> int:
        """Updates for that many facts to forget, which have so many different targets."""
        if self.steps == "auto":
            steps = max(LEAST_STEPS, STEPS_PER_FACT * facts - 2 * LEAST_STEPS)
            return steps * (OWN_TARGETS if targets > 1 else 1)
        return self.steps

    def prompts(self, facts: int) -> int:
        """Prompts to keep per step for that many facts to forget."""
        if self.retain_batch == "auto":
            return min(MOST_PROMPTS, max(LEAST_PROMPTS, round(PROMPTS_PER_FACT * facts)))
        return self.retain_batch

    def keeping(self, facts: int) -> float:
        """Weight of the KL divergence on prompts to keep for that many facts to forget."""
        if self.kl == "auto":
            return min(MOST_KL, max(LEAST_KL, KL_PER_FACT * facts))
        return self.kl

    def most(self, facts: int, targets: int = 1) -> int:
        """Updates at most."""
        return 2 * self.planned(facts, targets) if self.steps == "auto" else self.steps


class Limits(Piece):
    """When a run stops, with nothing written, because the model would be ruined; null: never."""

    perplexity: Annotated[Real, Field(gt=1)] | None = Field(
        default=10.0,
        description="Most that the perplexity of held-out text may be multiplied by, if it is measured.",
    )


class ChangeLimits(Limits):
    """Those of methods that change weights."""

    norm: Annotated[Real, Field(gt=0)] | None = Field(
        default=2.0,
        description="Largest change, of all facts and earlier ones together, relative to its weight.",
    )


class EditLimits(ChangeLimits):
    """Those of closed forms."""

    condition: Annotated[Real, Field(gt=1)] | None = Field(
        default=1e12, description="Largest condition number of a solve (a lower bound of it is looked at)."
    )
