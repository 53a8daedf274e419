"""The unlearners that are a loss: settings of each, and the terms that they minimise.

A new one is a class here with its fields and ``forget_terms``, a row in ``unlearners.METHODS`` and a file
``hparams/<method>.yaml``. Torch is loaded by ``objective`` only.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from editunlearn.hparams import Keeping, Piece, Real, Train, UnlearnerHParams, Whole
from editunlearn.unlearners.terms import Objective, Price, Term

if TYPE_CHECKING:
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.lm.loading import LM
    from editunlearn.unlearners.rows import Pool

FORGET, REFUSAL, RETAIN = ("forget",), ("refusal",), ("retain",)


class LossHParams(UnlearnerHParams):
    """What every method has that is a loss."""

    weight: Real = Field(default=1.0, ge=0, description="Weight of the forget term.")
    retain: Keeping | None = Field(
        default_factory=Keeping, description="What is trained on to stay, beside it; null: nothing."
    )

    def forget_terms(self) -> list[Term]:
        """What makes the model forget."""
        raise NotImplementedError

    def objective(self, lm: LM, request: ForgetRequest) -> Objective:
        """All terms, and how to make the rows that they take."""
        from editunlearn.unlearners import rows

        pools = {"forget": lambda: rows.forget(lm, request), "refusal": lambda: rows.refusal(lm, request)}
        return self.kept(lm, request, self.forget_terms(), pools)

    def kept(self, lm: LM, request: ForgetRequest, terms: list[Term], pools: dict[str, Any]) -> Objective:
        """An objective of some terms, with the retain term beside them."""
        if self.retain is not None:
            terms = [*terms, retain_term(self.retain)]
            pools = {**pools, "retain": partial(retain_pool, lm, request, self.retain)}
        return Objective(tuple(terms), pools)


def retain_term(hp: Keeping, weight: float | Price | None = None) -> Term:
    """The term that keeps what is to stay."""
    from editunlearn.unlearners import losses

    if hp.loss == "kl":
        return Term("retain", RETAIN, lambda v: losses.divergence(v.now, v.base), weight or hp.weight, hp.ratio)
    return Term("retain", RETAIN, lambda v: losses.nll(v.now), weight or hp.weight, hp.ratio)


def retain_pool(lm: LM, request: ForgetRequest, hp: Keeping) -> Pool:
    """Its rows; for the KL divergence all their tokens count, else the answers."""
    from editunlearn.unlearners import rows

    if hp.data == "text":
        return rows.keep_text(lm, hp.text, hp.text_length)
    pool = rows.keep_facts(lm, request)
    return rows.Pool([rows.whole(row) for row in pool.rows], 0) if hp.loss == "kl" else pool


class GA(LossHParams):
    """Gradient ascent."""

    method: Literal["ga"] = Field(default="ga", description="Name of the method.")
    retain: Keeping | None = Field(default=None, description="As published null.")
    paper: str | None = Field(default="https://arxiv.org/abs/2210.01504", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("forget", FORGET, lambda v: losses.ascent(v.now), self.weight)]


class GradDiff(GA):
    """Ascent on what is to be forgotten, descent on what is to stay."""

    method: Literal["graddiff"] = Field(  # type: ignore[assignment]
        default="graddiff", description="Name of the method."
    )
    retain: Keeping = Field(default_factory=Keeping, description="What is trained on to stay.")
    paper: str | None = Field(default="https://arxiv.org/abs/2401.06121", description="Where the method comes from.")


class Holding(Keeping):
    """The retain term of methods that hold on to a distribution."""

    loss: Literal["nll", "kl"] = Field(
        default="kl", description="As published the KL divergence to the unedited model, at all tokens."
    )


class KL(GA):
    """Ascent, with the KL divergence to the unedited model on what is to stay."""

    method: Literal["kl"] = Field(  # type: ignore[assignment]
        default="kl", description="Name of the method."
    )
    retain: Holding = Field(default_factory=Holding, description="What is held on to.")
    paper: str | None = Field(default="https://arxiv.org/abs/2401.06121", description="Where the method comes from.")


class IDK(LossHParams):
    """Fine-tuning on the targets, which are refusals unless others are asked for."""

    method: Literal["idk"] = Field(default="idk", description="Name of the method.")
    paper: str | None = Field(default="https://arxiv.org/abs/2401.06121", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("refusal", REFUSAL, lambda v: losses.nll(v.now), self.weight)]


class DPO(LossHParams):
    """The target is preferred to the true answer."""

    method: Literal["dpo"] = Field(default="dpo", description="Name of the method.")
    beta: Real = Field(default=0.1, gt=0, description="How soon a preference is enough.")
    paper: str | None = Field(default="https://arxiv.org/abs/2305.18290", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        return [Term("preference", ("refusal", "forget"), self.preference, self.weight)]

    def preference(self, won: Any, lost: Any) -> Any:
        """The loss of pairs."""
        from editunlearn.unlearners import losses

        return losses.dpo(won.now, won.base, lost.now, lost.base, self.beta)


class NPO(LossHParams):
    """Preference optimisation with the true answer as what is not wanted."""

    method: Literal["npo"] = Field(default="npo", description="Name of the method.")
    beta: Real = Field(default=0.1, gt=0, description="How soon an answer is unlikely enough.")
    paper: str | None = Field(default="https://arxiv.org/abs/2404.05868", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("forget", FORGET, lambda v: losses.npo(v.now, v.base, self.beta), self.weight)]


class SimNPO(LossHParams):
    """NPO without the unedited model, by length."""

    method: Literal["simnpo"] = Field(default="simnpo", description="Name of the method.")
    weight: Real = Field(default=0.125, ge=0, description="Weight of the forget term.")
    beta: Real = Field(default=4.5, gt=0, description="How soon an answer is unlikely enough.")
    delta: Real = Field(default=0.0, description="Negative log-likelihood a token that is enough.")
    paper: str | None = Field(default="https://arxiv.org/abs/2410.07163", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("forget", FORGET, lambda v: losses.simnpo(v.now, self.beta, self.delta), self.weight)]


class KTO(LossHParams):
    """The true answer is unwanted, measured against how far refusals have come."""

    method: Literal["kto"] = Field(default="kto", description="Name of the method.")
    beta: Real = Field(default=0.1, gt=0, description="How soon an answer is unlikely enough.")
    paper: str | None = Field(default="https://arxiv.org/abs/2402.01306", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [
            Term(
                "forget",
                ("forget", "refusal"),
                lambda lost, _refusal, z: losses.kto(lost.now, lost.base, z, self.beta),
                self.weight,
                shared=lambda _lost, refusal: losses.log_ratio(refusal.now, refusal.base),
            )
        ]


class UNDIAL(LossHParams):
    """Self-distillation with the true token's logit lowered."""

    method: Literal["undial"] = Field(default="undial", description="Name of the method.")
    beta: Real = Field(default=10.0, gt=0, description="What is taken off the true token's logit.")
    retain: Keeping | None = Field(default=None, description="As published null.")
    paper: str | None = Field(default="https://arxiv.org/abs/2402.10052", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("forget", FORGET, lambda v: losses.undial(v.now, v.base, self.beta), self.weight)]


class CEU(LossHParams):
    """Cross-entropy to the model's own distribution without the true token."""

    method: Literal["ce_u"] = Field(default="ce_u", description="Name of the method.")
    skip: Whole = Field(
        default=0, ge=0, description="First tokens of the answer that do not count; as published 1, for long answers."
    )
    retain: Keeping | None = Field(default=None, description="As published null.")
    paper: str | None = Field(default="https://arxiv.org/abs/2503.01224", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("forget", FORGET, lambda v: losses.ce_u(v.now, self.skip), self.weight)]


class WGA(LossHParams):
    """Ascent that leaves off tokens which are unlikely already."""

    method: Literal["wga"] = Field(default="wga", description="Name of the method.")
    beta: Real = Field(default=1.0, ge=0, description="Power of a token's probability that weighs it; 0 is ascent.")
    paper: str | None = Field(default="https://arxiv.org/abs/2502.19301", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("forget", FORGET, lambda v: losses.weighted_ascent(v.now, self.beta), self.weight)]


class SatImp(LossHParams):
    """Ascent on tokens that are neither unlikely nor certain."""

    method: Literal["satimp"] = Field(default="satimp", description="Name of the method.")
    beta1: Real = Field(default=5.0, ge=0, description="Power of a token's probability.")
    beta2: Real = Field(default=1.0, ge=0, description="Power of what is missing to certainty.")
    paper: str | None = Field(default="https://arxiv.org/abs/2505.11953", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        weigh = partial(losses.saturation_importance, beta1=self.beta1, beta2=self.beta2)
        return [Term("forget", FORGET, lambda v: weigh(v.now), self.weight)]


class IHL(LossHParams):
    """The inverted hinge loss: the true token falls behind the next likeliest, and no further."""

    method: Literal["ihl"] = Field(default="ihl", description="Name of the method.")
    paper: str | None = Field(default="https://arxiv.org/abs/2408.06621", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("forget", FORGET, lambda v: losses.inverted_hinge(v.now), self.weight)]


class DualPrice(Piece):
    """The retain loss is kept below a bound; its weight is the price of that."""

    start: Real = Field(default=1.0, ge=0, description="The weight at the beginning.")
    rate: Real = Field(default=5.0, ge=0, description="How fast it follows the loss, once an epoch.")
    allowed: Real = Field(default=0.3, ge=0, description="Retain loss that is allowed; at least what it is before.")
    warmup: Whole = Field(default=2, ge=0, description="Epochs in which the weight stays.")


class PDU(LossHParams):
    """Flat logits where the true answer was, with a bound on the retain loss (primal-dual)."""

    method: Literal["pdu"] = Field(default="pdu", description="Name of the method.")
    weight: Real = Field(default=0.001, ge=0, description="Weight of the forget term, which squares logits.")
    retain: Keeping = Field(default_factory=Keeping, description="What is kept below the bound.")
    price: DualPrice = Field(default_factory=DualPrice, description="The bound, and its price.")
    paper: str | None = Field(default="https://arxiv.org/abs/2506.05314", description="Where the method comes from.")

    def forget_terms(self) -> list[Term]:
        from editunlearn.unlearners import losses

        return [Term("forget", FORGET, lambda v: losses.flatness(v.now), self.weight)]

    def kept(self, lm: LM, request: ForgetRequest, terms: list[Term], pools: dict[str, Any]) -> Objective:
        """The retain term has a price."""
        price = Price(self.price.start, self.price.rate, self.price.allowed, self.price.warmup)
        pools = {**pools, "retain": partial(retain_pool, lm, request, self.retain)}
        return Objective((*terms, retain_term(self.retain, price)), pools)


class AltPO(DPO):
    """The model's own other answers are preferred to the true one."""

    method: Literal["altpo"] = Field(  # type: ignore[assignment]
        default="altpo", description="Name of the method."
    )
    alternatives: Whole = Field(default=5, ge=1, description="Other answers for each fact, sampled from the model.")
    tokens: Whole = Field(default=12, ge=1, description="Tokens of such an answer, at most.")
    paper: str | None = Field(default="https://arxiv.org/abs/2409.13474", description="Where the method comes from.")

    def objective(self, lm: LM, request: ForgetRequest) -> Objective:
        from editunlearn.unlearners import alternatives, rows

        pools = {
            "forget": lambda: rows.forget(lm, request),
            "alternative": lambda: alternatives.pool(lm, request, self.alternatives, self.tokens, self.seed),
        }
        term = Term("preference", ("alternative", "forget"), self.preference, self.weight)
        return self.kept(lm, request, [term], pools)


class RandomLabels(LossHParams):
    """Fine-tuning on answers of random tokens."""

    method: Literal["random_labels"] = Field(default="random_labels", description="Name of the method.")
    retain: Keeping | None = Field(default=None, description="As published null.")
    paper: str | None = Field(default="https://arxiv.org/abs/2402.15159", description="Where the method comes from.")

    def objective(self, lm: LM, request: ForgetRequest) -> Objective:
        from editunlearn.unlearners import losses, rows

        term = Term("forget", ("wrong",), lambda v: losses.nll(v.now), self.weight)
        pools = {"forget": lambda: rows.forget(lm, request), "wrong": lambda: self.wrong(lm, request)}
        return self.kept(lm, request, [term], pools)

    def wrong(self, lm: LM, request: ForgetRequest) -> Pool:
        """The facts with wrong labels."""
        from editunlearn.unlearners import wrong

        return wrong.random(lm, request, self.seed)


class AdversarialSamples(RandomLabels):
    """Fine-tuning on the unedited model's second choices."""

    method: Literal["adversarial_samples"] = Field(  # type: ignore[assignment]
        default="adversarial_samples", description="Name of the method."
    )

    def wrong(self, lm: LM, request: ForgetRequest) -> Pool:
        """The facts with wrong labels."""
        from editunlearn.unlearners import wrong

        return wrong.second_choice(lm, request)


class Projections(Train):
    """Training of MLP outputs."""

    what: Literal["full", "lora", "modules"] = Field(
        default="modules", description="By default the output projections of the MLPs, at the block and before."
    )
    modules: list[str] = Field(default=["mlp.down_proj"], description="Ends of their names.")


class RMU(LossHParams):
    """States of one block are pushed to a random direction on what is to be forgotten, and held on what is to stay."""

    method: Literal["rmu"] = Field(default="rmu", description="Name of the method.")
    layer: Annotated[Real, Field(ge=0, le=1)] = Field(default=0.4, description="Depth of the block whose states count.")
    steering: Real = Field(
        default=2.0, gt=0, description="Length of the direction, in mean norms of the unedited states on the facts."
    )
    retain: Keeping = Field(
        default_factory=Keeping, description="Where states are held; its `loss` is not looked at, all tokens count."
    )
    train: Projections = Field(default_factory=Projections, description="What is trained, and how.")
    paper: str | None = Field(default="https://arxiv.org/abs/2403.03218", description="Where the method comes from.")

    def auto_layers(self, count: int) -> list[int]:
        """The block and the two before it."""
        last = min(int(self.layer * count + 1e-9), count - 1)
        return list(range(max(0, last - 2), last + 1))

    def objective(self, lm: LM, request: ForgetRequest) -> Objective:
        from editunlearn.unlearners import rmu

        return rmu.objective(self, lm, request)
