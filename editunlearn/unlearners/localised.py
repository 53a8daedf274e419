"""Unlearners that choose where to train: settings of each, the random control included. Torch is loaded when used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from editunlearn.hparams import Keeping, Real, Train, UnlearnerHParams, Whole
from editunlearn.unlearners.objectives import GA, IDK, NPO, LossHParams
from editunlearn.unlearners.terms import Objective, Term

if TYPE_CHECKING:
    from torch import Tensor

    from editunlearn.deltas.lowrank import Dense, Factors
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.lm.loading import LM


class LocalisedHParams(LossHParams):
    """What every method has that chooses where to train, by gradients of the model as it came."""

    loss: Literal["graddiff", "npo", "refusal"] = Field(
        default="graddiff", description="The forget term: ascent, NPO, or fine-tuning on the targets."
    )
    beta: Real = Field(default=0.1, gt=0, description="For NPO: how soon an answer is unlikely enough.")
    retain: Keeping = Field(default_factory=Keeping, description="What is trained on to stay, and measured to choose.")
    probe: Whole = Field(default=64, ge=1, description="Rows to keep that are looked at to choose, at most.")
    random: bool = Field(
        default=False,
        strict=True,
        description="The control: train as many entries, rows or matrices drawn at random instead.",
    )

    def forget_terms(self) -> list[Term]:
        """Those of the loss."""
        kinds: dict[str, LossHParams] = {
            "graddiff": GA(weight=self.weight),
            "npo": NPO(weight=self.weight, beta=self.beta),
            "refusal": IDK(weight=self.weight),
        }
        return kinds[self.loss].forget_terms()

    def masks(self, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where to train, by the gradients of the likelihood of what is to be forgotten and to stay."""
        raise NotImplementedError


class WholeMatrices(LocalisedHParams):
    """What chooses entries of matrices, which a LoRA does not have."""

    @model_validator(mode="after")
    def _no_lora(self) -> Self:
        if self.train.what == "lora":
            raise ValueError(
                f"train.what is 'lora'; {self.method} chooses entries of the weights themselves: full or modules."
            )
        return self


class GRIN(WholeMatrices):
    """The weights that matter most to what is to be forgotten, relative to what is to stay; noise, then training."""

    method: Literal["grin"] = Field(default="grin", description="Name of the method.")
    loss: Literal["graddiff", "npo", "refusal"] = Field(default="refusal", description="The forget term.")
    fraction: Annotated[Real, Field(gt=0, le=1)] = Field(
        default=0.05, description="Share of the weights that is trained."
    )
    noise: Real = Field(
        default=0.02,
        ge=0,
        description="Deviation of the noise put on them first, in units of the weights' own.",
    )
    epsilon: Real = Field(
        default=0.1, gt=0, description="Added to the retain gradient in the ratio, in units of its mean size."
    )
    paper: str | None = Field(default="https://arxiv.org/abs/2508.06467", description="Where the method comes from.")

    def masks(self, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The largest ratios."""
        from editunlearn.unlearners import localise

        return localise.largest(localise.gradient_ratio(forget, retain, self.epsilon), self.fraction)


class SURE(WholeMatrices):
    """Rows whose forget gradient is largest, trained at a large rate."""

    method: Literal["sure"] = Field(default="sure", description="Name of the method.")
    loss: Literal["graddiff", "npo", "refusal"] = Field(default="npo", description="The forget term.")
    percentile: Annotated[Real, Field(ge=0, lt=100)] = Field(
        default=90.0, description="Rows are trained whose gradient's norm is above this percentile of all."
    )
    paper: str | None = Field(default="https://arxiv.org/abs/2410.16454", description="Where the method comes from.")

    def masks(self, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The largest rows."""
        from editunlearn.unlearners import localise

        return localise.largest(localise.row_norms(forget), 1 - self.percentile / 100)


class MemFlex(LocalisedHParams):
    """Matrices whose gradients on what is to be forgotten are large, and unlike those of what is to stay."""

    method: Literal["memflex"] = Field(default="memflex", description="Name of the method.")
    weight: Real = Field(default=0.4, ge=0, description="Weight of the forget term.")
    cosine: Annotated[Real, Field(ge=-1, le=1)] = Field(
        default=0.92, description="Matrices are trained whose two gradients have a cosine below this."
    )
    magnitude: Real = Field(
        default=1.0,
        ge=0,
        description="And a mean absolute forget gradient above this, in units of `scale`; published 0.0006 absolute.",
    )
    scale: Literal["relative", "absolute"] = Field(
        default="relative", description="Measure magnitude in medians over all matrices, or in raw numbers."
    )
    copies: Whole = Field(
        default=3, ge=1, description="Times that each answer is looked at, half of its tokens replaced by random ones."
    )
    paper: str | None = Field(default="https://arxiv.org/abs/2407.01920", description="Where the method comes from.")

    def masks(self, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole matrices."""
        from editunlearn.unlearners import localise

        return localise.region(forget, retain, self.cosine, self.magnitude, relative=self.scale == "relative")


class LowRank(Train):
    """Training of a LoRA."""

    what: Literal["full", "lora", "modules"] = Field(default="lora", description="Always lora.")


class LoKU(LossHParams):
    """The inverted hinge loss on a LoRA that begins with what matters most to what is to be forgotten (FILA)."""

    method: Literal["loku"] = Field(default="loku", description="Name of the method.")
    train: LowRank = Field(default_factory=LowRank, description="What is trained, and how.")
    retain: Keeping = Field(default_factory=Keeping, description="What is trained on to stay, and measured to begin.")
    probe: Whole = Field(default=64, ge=1, description="Rows to keep that are looked at to begin, at most.")
    epsilon: Real = Field(
        default=0.01, gt=0, description="Added to the retain Fisher information in the ratio, in units of its mean."
    )
    paper: str | None = Field(default="https://arxiv.org/abs/2408.06621", description="Where the method comes from.")

    @model_validator(mode="after")
    def _lora(self) -> Self:
        if self.train.what != "lora":
            raise ValueError(f"train.what is {self.train.what!r}; loku begins with a LoRA made of the weights: lora.")
        return self

    def forget_terms(self) -> list[Term]:
        """The inverted hinge loss."""
        from editunlearn.unlearners import losses

        return [Term("forget", ("forget",), lambda v: losses.inverted_hinge(v.now), self.weight)]


class TaskVector(UnlearnerHParams):
    """What training on the facts would change is taken off instead (arXiv 2212.04089)."""

    method: Literal["task_vector"] = Field(default="task_vector", description="Name of the method.")
    factor: Real = Field(
        default=5.0, gt=0, description="Times the change that learning the facts more makes is taken off."
    )
    paper: str | None = Field(default="https://arxiv.org/abs/2212.04089", description="Where the method comes from.")

    @model_validator(mode="after")
    def _no_stop(self) -> Self:
        if self.stop is not None:
            raise ValueError("stop is set; task_vector trains towards the facts, and forgets only at the end: null.")
        return self

    def objective(self, lm: LM, request: ForgetRequest) -> Objective:
        """To know the facts better."""
        from editunlearn.unlearners import losses, rows

        term = Term("learning", ("forget",), lambda v: losses.nll(v.now))
        return Objective((term,), {"forget": lambda: rows.forget(lm, request)})

    def finished(self, updates: dict[str, Dense] | dict[str, Factors]) -> Any:
        """The change the other way round."""
        from editunlearn.deltas.lowrank import Dense, Factors

        return {
            name: Factors(-self.factor * found.left, found.right)
            if isinstance(found, Factors)
            else Dense(-self.factor * found.left)
            for name, found in updates.items()
        }
