"""How much a model would change if it were trained on a text: little on what it was trained on before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.evaluation.metrics import memorisation
from editunlearn.lm.hooks import frozen
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Row, batch

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM


def gradient_norms(lm: LM, rows: Sequence[Row], done: Callable[[int], None] = lambda _: None) -> list[float]:
    """:func:`memorisation.gradient_norm` of the mean loss of each row's target tokens, of the model as it is now.

    One row, forward and backward through all weights, at a time: slow. A gradient is dropped as soon as its norm is
    known, so that no second set of weights is ever in memory. Weights that are not floating-point (quantised ones) have
    none and are left out.

    Args:
        done: called with 1 after every row.
    """
    found: list[float] = []
    with frozen(lm.model):  # which also puts the flags back
        parameters = [p for p in lm.model.parameters() if p.is_floating_point()]
        norms: list[float] = []

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None  # noqa: S101 - torch calls this right after it was made
            norms.append(float(parameter.grad.float().norm()))
            parameter.grad = None

        handles = [
            p.requires_grad_(True).register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
            for p in parameters
        ]
        try:
            for row in rows:
                norms.clear()
                _loss(lm, row).backward()  # type: ignore[no-untyped-call]
                found.append(memorisation.gradient_norm(norms))
                done(1)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _loss(lm: LM, row: Row) -> Tensor:
    """Through the model's own head: a tied embedding gets its gradient from both ends."""
    padded = batch([row], lm.pad_id, lm.device)
    with torch.enable_grad():
        logits = forward(lm.model, padded).logits[padded.targets]
        return torch.nn.functional.cross_entropy(logits.float(), padded.labels)
