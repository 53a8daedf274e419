"""The effect of every state at once, to first order: gradient times what restoring would change.

One backward pass instead of one pass a state ("attribution patching": Syed et al. 2023, arXiv 2310.10348). It is exact
where the probability is linear between the corrupted state and the clean one, and wrong where it saturates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.hooks import frozen
from editunlearn.tracing.restore import window

if TYPE_CHECKING:
    from editunlearn.tracing.prompts import TracedPrompt
    from editunlearn.tracing.states import Kind, States, Tracer


def first_order(
    tracer: Tracer, prompt: TracedPrompt, clean: States, corrupted: States, width: int
) -> dict[Kind, Tensor]:
    """For each kind the estimated indirect effects (layers, tokens from the subject's first one on), float64.

    Averaged over the noise samples. Windows add up the estimates of their states, as if none reached the answer through
    another one of them.
    """
    with torch.enable_grad(), frozen(tracer.lm.model):
        states = tracer.record(prompt, corrupted.entering[0].detach().requires_grad_())
        places = list(states.outputs)
        gradients = torch.autograd.grad(states.chance.sum(), [states.outputs[place] for place in places])
    single: dict[tuple[Kind, int], Tensor] = {}
    for place, gradient in zip(places, gradients, strict=True):
        change = clean.outputs[place].double() - corrupted.outputs[place].double()
        effect = (gradient.double() * change).sum(-1).mean(0)
        single[place] = effect[prompt.tokens.start :].cpu()
    found: dict[Kind, Tensor] = {}
    for kind in tracer.kinds:
        each = torch.stack([single[kind, layer] for layer in range(tracer.layers)])
        widths = 1 if kind == "block" else width
        found[kind] = torch.stack(
            [each[list(window(layer, widths, tracer.layers))].sum(0) for layer in range(tracer.layers)]
        )
    return found
