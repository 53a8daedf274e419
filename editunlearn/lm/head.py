"""Losses through the output head, a piece of the rows at a time: the logits of all of them never exist at once.

Logits of 500 positions of a 262,144-word vocabulary are 0.25 GB in bfloat16, and making, reading and freeing such a
tensor costs as much as the products themselves. Here one buffer holds the logits of a piece; they become the gradient
in place, go back through the head, and only the gradient of the hidden states is kept ("fused linear cross-entropy").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editunlearn.lm.hooks import first_tensor
from editunlearn.numerics import losses

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

PIECE = 1 << 26
"""Logits of one piece: 256 rows of 262,144. Each piece reads the head's weights twice, so it must not be small."""


class Head:
    """The output head of a model, with everything that the model does to its logits.

    A head that is a plain matrix product, whose outputs the model leaves as they are, goes the fast way; others
    (soft caps, scaling, biases) are differentiated by autograd, a piece at a time as well.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.plain = _is_plain(lm)
        self.rows = max(1, PIECE // int(lm.head.weight.shape[0]))  # type: ignore[index]
        self._buffer = torch.empty(0)

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """NLL in nats of ``labels`` (n,) given states before the head (n, width), (n,) float32; differentiable."""
        return self.losses(hidden, labels, hidden[:0])

    def kl(self, base: Tensor, hidden: Tensor) -> Tensor:
        """KL(base || edited) in nats at each row of states before the head (n, width), (n,) float32.

        ``base`` gets no gradient.
        """
        return self.losses(hidden, torch.empty(0, dtype=torch.long, device=hidden.device), base)

    def losses(self, hidden: Tensor, labels: Tensor, base: Tensor) -> Tensor:
        """Both at once, so that the weights are read once: NLL of the first rows, KL of the others.

        Args:
            hidden: states before the head (n + m, width).
            labels: of the first rows, (n,).
            base: states of the unedited model for the other rows, (m, width).

        Returns:
            (n + m,) float32, differentiable with respect to ``hidden``.
        """
        here = self._weight.device if self.plain else self.lm.device
        found: Tensor = _Fused.apply(self, hidden.to(here), labels.to(here), base.detach().to(here))  # type: ignore[no-untyped-call]
        return found.to(self.lm.device)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of states before the head (n, width), in pieces (rows, vocabulary), each good until the next."""
        here = self._weight.device if self.plain else self.lm.device
        for piece in torch.split(hidden, self.rows):
            yield (self._product(piece.to(here)) if self.plain else logits_of(self.lm, piece)).to(self.lm.device)

    def likeliest(self, hidden: Tensor) -> Tensor:
        """Token of the largest logit at each state before the head (n, width), (n,) long."""
        return torch.cat([piece.argmax(-1) for piece in self.logits(hidden)])

    def _piece(self, hidden: Tensor, labels: Tensor, base: Tensor, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        """Losses of a few rows and, if wanted, their gradient with respect to ``hidden``."""
        rows = len(hidden)
        states = torch.cat([hidden, base])
        if not self.plain:
            return self._by_autograd(states, labels, rows, grad=grad)
        logits = self._product(states)
        first, second, unedited = logits[: len(labels)], logits[len(labels) : rows], logits[rows:]
        loss = torch.cat(
            [
                losses.cross_entropy_and_gradient(first, labels, first if grad else None),
                losses.kl_and_gradient(unedited, second, second if grad else None),
            ]
        )
        return loss, logits[:rows] @ self._weight if grad else None

    def _by_autograd(self, states: Tensor, labels: Tensor, rows: int, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(grad):
            states = states.detach().requires_grad_(grad)
            logits = logits_of(self.lm, states)
            first, second, unedited = logits[: len(labels)], logits[len(labels) : rows], logits[rows:]
            loss = torch.cat([losses.cross_entropy(first, labels), losses.kl(unedited, second)])
            return loss.detach(), torch.autograd.grad(loss.sum(), states)[0][:rows] if grad else None

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.lm.head.weight.detach()  # type: ignore[operator]
        return weight

    def _product(self, states: Tensor) -> Tensor:
        """Logits in a buffer that is used again: fresh memory of this size costs as much as filling it twice."""
        weight = self._weight
        size = len(states) * len(weight)
        if self._buffer.numel() < size or self._buffer.dtype != states.dtype:
            self._buffer = torch.empty(size, dtype=states.dtype, device=states.device)
        return torch.mm(states, weight.T, out=self._buffer[:size].view(len(states), len(weight)))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, hidden: Tensor, labels: Tensor, base: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[1]
        loss = torch.empty(len(hidden), device=hidden.device)
        ctx.grad = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), head.rows):
            part = slice(start, start + head.rows)
            beside = base[max(0, start - len(labels)) : max(0, start + head.rows - len(labels))]
            loss[part], grad = head._piece(hidden[part], labels[part], beside, grad=wanted)
            if wanted:
                ctx.grad[part] = grad
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.grad * upstream[:, None].to(ctx.grad.dtype), None, None


@contextmanager
def before_head(head: nn.Module, scored: Tensor) -> Iterator[list[Tensor]]:
    """Collect the states (number scored, width) that enter the head, row-major; the head itself is left out.

    The model's logits are a placeholder of one word inside.

    Args:
        scored: bool (batch, length).
    """
    seen: list[Tensor] = []
    own = head.__dict__.get("forward")

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden = first_tensor(hidden)
        seen.append(hidden[scored.to(hidden.device)])
        return hidden[:, :1, :1]

    head.__dict__["forward"] = forward
    try:
        yield seen
    finally:
        del head.__dict__["forward"]
        if own is not None:
            head.__dict__["forward"] = own


def hidden_of(lm: LM, scored: Tensor, run: Callable[[], object]) -> Tensor:
    """States before the head at the ``scored`` positions of the pass ``run``, (number scored, width)."""
    with before_head(lm.head, scored) as seen:
        run()
    return seen[0].to(lm.device)


def logits_of(lm: LM, hidden: Tensor) -> Tensor:
    """Logits (n, vocabulary) of hidden states (n, width) taken right before the head.

    All that the model does to its logits is done: it runs on one token, and its head gets ``hidden`` instead of that
    token's state.
    """
    one = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    handle = lm.head.register_forward_pre_hook(lambda _module, args: (hidden[None], *args[1:]))
    try:
        return first_tensor(lm.model(input_ids=one, use_cache=False).logits).squeeze(0).to(lm.device)
    finally:
        handle.remove()


@torch.no_grad()
def _is_plain(lm: LM) -> bool:
    """Whether logits are the head's weight times the hidden state and nothing else, seen on two random states."""
    weight = getattr(lm.head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        return False
    if getattr(lm.head, "bias", None) is not None:
        return False
    draw = torch.Generator().manual_seed(0)
    states = 30 * torch.randn(2, weight.shape[1], generator=draw).to(weight)  # large: a soft cap shows
    bare = (states @ weight.T).float()
    whole = logits_of(lm, states).float().to(bare.device)
    return bool((whole - bare).norm() <= 0.01 * bare.norm())
