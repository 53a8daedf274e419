"""Settings of a training that teaches facts: the model that is to forget, and the one that never knew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from editunlearn.hparams import ChangeLimits, Train, UnlearnerHParams
from editunlearn.unlearners.terms import Objective, Term

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact, ForgetRequest
    from editunlearn.lm.loading import LM
    from editunlearn.lm.tokens import Row


class Teaching(UnlearnerHParams):
    """Training on the true answers of facts."""

    method: Literal["finetune"] = Field(default="finetune", description="Always finetune.")
    train: Train = Field(
        default_factory=lambda: Train(epochs=10, batch=16, lr=0.001, schedule="linear", warmup=0.1),
        description="What is trained, and how.",
    )
    limits: ChangeLimits = Field(
        default_factory=lambda: ChangeLimits(perplexity=None, norm=None), description="No limits: it is to learn."
    )

    def objective(self, lm: LM, request: ForgetRequest) -> Objective:
        """To say the answers of ``request.facts``."""
        from editunlearn.unlearners import losses, rows

        def pool() -> rows.Pool:
            return rows.Pool([taught_row(lm, fact) for fact in request.facts], 1)

        return Objective((Term("learning", ("forget",), lambda v: losses.nll(v.now)),), {"forget": pool})


def taught_row(lm: LM, fact: Fact) -> Row:
    """Prompt and true answer; that of a question ends the turn, as statements go on behind theirs."""
    from editunlearn.lm.tokens import encode
    from editunlearn.unlearners import rows

    if fact.is_question:
        return encode(lm, rows.prompt_of(lm, fact), fact.answer, "prompt_last")
    return rows.answer_row(lm, fact)
