"""What unlearners minimise, as pure functions of logits and labels.

Every loss gives one number for each row, (rows,) float32; a batch's loss is their mean, whatever the rows' lengths. A
:class:`Scored` is made in one place, where logits are shifted against labels and ignored positions drop out, so that
no loss can get that wrong by itself.

Notation: ``L`` is the negative log-likelihood of a row's answer summed over its tokens, ``l`` its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from editunlearn.numerics.losses import cross_entropy, kl, mean_by

IGNORED = -100
"""Label of a position that does not count."""


class Scored:
    """The positions of some rows that predict a label.

    Attributes:
        labels: (n,) the tokens that come next there.
        owners: (n,) number of the row of each.
        count: rows.

    Args:
        logits: makes the (n, vocabulary) logits, when a loss asks for them.
        nll: makes the (n,) negative log-likelihoods of the labels in nats; default: from the logits.
        kl: makes the (n,) KL divergences from the unedited model there; default: from both logits.
    """

    def __init__(
        self,
        labels: Tensor,
        owners: Tensor,
        count: int,
        logits: Callable[[], Tensor],
        nll: Callable[[], Tensor] | None = None,
        kl: Callable[[], Tensor] | None = None,
    ) -> None:
        self.labels, self.owners, self.count = labels, owners, count
        self._logits, self._nll, self._kl = logits, nll, kl

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Scored:
        """From logits (rows, length, vocabulary) and labels (rows, length), ``IGNORED`` where there is none.

        Logits at a position predict the token behind it: label t belongs to logits t - 1, the first label to none.
        """
        counts = labels[:, 1:] != IGNORED
        owners = counts.nonzero()[:, 0]
        return cls(labels[:, 1:][counts], owners, len(labels), lambda: logits[:, :-1][counts])

    @cached_property
    def logits(self) -> Tensor:
        """(n, vocabulary)."""
        return self._logits()

    @cached_property
    def nll(self) -> Tensor:
        """(n,) float32, nats."""
        return self._nll() if self._nll is not None else cross_entropy(self.logits, self.labels)

    def kl(self, base: Scored) -> Tensor:
        """(n,) float32, nats: KL(base || these); ``base`` gets no gradient."""
        return self._kl() if self._kl is not None else kl(base.logits, self.logits)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` (n,) over each row's positions, (rows,); 0 for a row without any."""
        return mean_by(values, self.owners, self.count)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` (n,) over each row's positions, (rows,)."""
        return torch.zeros(self.count, device=values.device, dtype=values.dtype).index_add(0, self.owners, values)

    def first(self, skipped: int) -> Tensor:
        """(n,) bool: among the first ``skipped`` positions of its row."""
        sizes = self.owners.bincount(minlength=self.count)
        place = torch.arange(len(self.owners), device=self.owners.device) - (sizes.cumsum(0) - sizes)[self.owners]
        return place < skipped


# --- of the likelihood of a row's own tokens


def nll(now: Scored) -> Tensor:
    """l: what ordinary training minimises; on refusals it is IDK fine-tuning (TOFU, arXiv 2401.06121)."""
    return now.mean(now.nll)


def ascent(now: Scored) -> Tensor:
    """-l: gradient ascent."""
    return -nll(now)


def weighted_ascent(now: Scored, beta: float) -> Tensor:
    """WGA (arXiv 2502.19301): -mean_t p_t^beta (-log p_t), the weight without gradient; beta 0 is ascent."""
    return -now.mean((-beta * now.nll.detach()).exp() * now.nll)


def saturation_importance(now: Scored, beta1: float, beta2: float) -> Tensor:
    """SatImp (arXiv 2505.11953): -mean_t p_t^beta1 (1 - p_t)^beta2 (-log p_t), the weight without gradient."""
    p = (-now.nll.detach()).exp()
    return -now.mean(p**beta1 * (1 - p) ** beta2 * now.nll)


def log_ratio(now: Scored, base: Scored) -> Tensor:
    """log p - log p_base of each row's answer, summed over its tokens, (rows,); ``base`` gets no gradient."""
    return base.sum(base.nll.detach()) - now.sum(now.nll)


def npo(now: Scored, base: Scored, beta: float) -> Tensor:
    """NPO (arXiv 2404.05868): -(2 / beta) log sigma(-beta log(p / p_base))."""
    return -2 / beta * functional.logsigmoid(-beta * log_ratio(now, base))


def simnpo(now: Scored, beta: float, delta: float) -> Tensor:
    """SimNPO (arXiv 2410.07163): -(2 / beta) log sigma(beta (l - delta)); the paper's margin is beta delta."""
    return -2 / beta * functional.logsigmoid(beta * (nll(now) - delta))


def dpo(won: Scored, won_base: Scored, lost: Scored, lost_base: Scored, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290) with NPO's factor: -(2 / beta) log sigma(beta (ratio of the wanted - of the unwanted)).

    Refusals as what is wanted make IdkDPO, the model's own plausible alternatives AltPO (arXiv 2409.13474).
    """
    margin = log_ratio(won, won_base) - log_ratio(lost, lost_base)
    return -2 / beta * functional.logsigmoid(beta * margin)


def kto(now: Scored, base: Scored, divergence: Tensor, beta: float) -> Tensor:
    """KTO (arXiv 2402.01306) for unwanted answers, as in NPO's experiments: 1 - (2 / beta) sigma(z - beta log ratio).

    Args:
        divergence: z, one number without gradient: the mean log ratio of refusals over the whole batch.
    """
    return 1 - 2 / beta * torch.sigmoid(divergence.detach() - beta * log_ratio(now, base))


# --- of the whole distribution of the next token


def wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def divergence(now: Scored, base: Scored) -> Tensor:
    """Mean KL(base || now) over the row's positions."""
    return now.mean(now.kl(base))


def undial(now: Scored, base: Scored, beta: float) -> Tensor:
    """UNDIAL (arXiv 2402.10052): cross-entropy to softmax(base logits - beta at the true token)."""
    aim = wide(base.logits.detach()).scatter_add(
        -1, now.labels[:, None], torch.full_like(wide(base.logits[:, :1]), -beta)
    )
    return now.mean(-(aim.softmax(-1) * wide(now.logits).log_softmax(-1)).sum(-1))


def ce_u(now: Scored, skipped: int = 1) -> Tensor:
    """CE-U (arXiv 2503.01224): cross-entropy to the model's own distribution without the true token.

    Args:
        skipped: tokens at the answer's beginning that do not count, as published one.
    """
    logits = wide(now.logits)
    aim = logits.detach().scatter(-1, now.labels[:, None], -torch.inf).softmax(-1)
    each = -(aim * logits.log_softmax(-1)).sum(-1)
    counts = (~now.first(skipped)).to(each.dtype)
    return now.sum(each * counts) / now.sum(counts).clamp(min=1)


def inverted_hinge(now: Scored) -> Tensor:
    """IHL (LoKU, arXiv 2408.06621): mean_t 1 + p(true) - max p(other), between 0 and 2."""
    p = wide(now.logits).softmax(-1)
    own = p.gather(-1, now.labels[:, None])[:, 0]
    other = p.scatter(-1, now.labels[:, None], -torch.inf).amax(-1)
    return now.mean(1 + own - other)


def flatness(now: Scored) -> Tensor:
    """Forget loss of PDU (arXiv 2506.05314): mean_t (max_v z - mean_v z)^2 of the logits z."""
    logits = wide(now.logits)
    return now.mean((logits.amax(-1) - logits.mean(-1)).square())


# --- of hidden states


def misdirection(states: Tensor, owners: Tensor, count: int, aim: Tensor) -> Tensor:
    """Forget loss of RMU (arXiv 2403.03218): mean_t |h - aim|^2 / |aim|^2.

    Args:
        states: (n, width) of one block. owners: (n,) their rows. aim: (width,), the steering vector.
    """
    return mean_by((wide(states) - aim).square().sum(-1) / aim.square().sum(), owners, count)


def displacement(states: Tensor, base: Tensor, owners: Tensor, count: int, unit: float) -> Tensor:
    """Retain loss of RMU: mean_t |h - h_base|^2 / unit^2; states and base (n, width), ``base`` without gradient."""
    return mean_by((wide(states) - wide(base.detach())).square().sum(-1) / unit**2, owners, count)


# --- the multiplier of a constrained method


def ascended(multiplier: float, loss: float, allowed: float, rate: float) -> float:
    """PDU's dual step: max(0, multiplier + rate (loss - allowed)), the price of a retain loss above ``allowed``."""
    return max(0.0, multiplier + rate * (loss - allowed))
