"""How the wanted change is divided over several layers.

``joint``: every site has its own change of its own output, all optimised together; nothing needs to be divided.
``residual`` (MEMIT, arXiv 2210.07229, eq. 20): one change of the last edited block's output; each site in turn takes
an equal share of what is still missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.hooks import StopForward, on_output, stack
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Row, batch, until_lookup

if TYPE_CHECKING:
    from editunlearn.editors.value_types import Values
    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM

LEAST_GATE = 0.05
"""A gate that is closed further than this is not worked against: the change would have to be immense."""

Spread = Literal["joint", "residual"]


def value_modules(lm: LM, sites: Sequence[Site], spread: Spread) -> list[str]:
    """Modules whose outputs the values change: the sites, or the last edited block."""
    return [s.name for s in sites] if spread == "joint" else [lm.layout.block_name(sites[-1].layer)]


def residuals(
    lm: LM,
    sites: Sequence[Site],
    number: int,
    read: Callable[[Sequence[str]], dict[str, Tensor]],
    found: Values,
    spread: Spread,
) -> Tensor:
    """Wanted change of the output of site ``number`` for each fact on the model as it computes now, (n, d_out) float32.

    Args:
        read: (names of modules, the first being the last to run) -> their outputs at the lookup tokens of the bare
            prompts, (n, width) each.
    """
    if spread == "joint":
        return found.change[:, number]
    block = lm.layout.block_name(sites[-1].layer)
    gate = lm.layout.gate_name(sites[number].layer)
    now = read([block, sites[number].name, *([gate] if gate else [])])
    missing = found.clean[:, 0] + found.change[:, 0] - now[block]
    share = missing / ((len(sites) - number) * lm.layout.scales_output)
    if gate is not None:
        share = share / now[gate].sigmoid().clamp(min=LEAST_GATE)
    norm_name = lm.layout.post_norm_name(sites[number].layer)
    if norm_name is None:
        return share
    return before_norm(lm.layout.module(lm.model, norm_name), now[sites[number].name], share)


@torch.no_grad()
def outputs_at_lookup(lm: LM, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of modules at the lookup token, each (len(rows), width) float32 on the CPU.

    The module that is named first must be the last to run; the pass stops there.
    """
    prompts = [until_lookup(r) for r in rows]
    found: dict[str, list[Tensor]] = {n: [torch.empty(0)] * len(rows) for n in names}

    def run(part: Sequence[int]) -> None:
        padded = batch([prompts[i] for i in part], lm.pad_id, lm.device)

        def see(_inputs: Tensor, output: Tensor, name: str) -> None:
            for i, value in zip(part, padded.at_lookup(output).float().cpu(), strict=True):
                found[name][i] = value
            if name == names[0]:
                raise StopForward

        hooks = [on_output(lm.layout.module(lm.model, n), lambda x, y, n=n: see(x, y, n)) for n in names]  # type: ignore[misc]
        with stack(hooks), suppress(StopForward):
            forward(lm.model, padded)

    halving(by_length([len(r.ids) for r in prompts]), run, lambda _: None)
    return {n: torch.stack(v) for n, v in found.items()}


@torch.no_grad()
def before_norm(norm: nn.Module, output: Tensor, change: Tensor) -> Tensor:
    """Change of a norm's input after which its output changes by ``change`` as far as it can.

    A root-mean-square norm ``y / rms(y) * g`` fixes the length of its output in units of ``g``, so only the direction
    can be met. Of all inputs with the wanted direction the one nearest to ``output`` is taken.

    Args:
        norm: the module between the MLP and the residual stream (Gemma 2 and 3, OLMo 2).
        output: its input now, (n, d).
        change: wanted change of its output, (n, d).
    """
    weight = next(norm.parameters())
    gain: Tensor = norm(torch.ones(1, output.shape[-1]).to(weight)).float().cpu()
    now: Tensor = norm(output.to(weight)).float().cpu()
    direction = (now + change) / torch.where(gain.abs() < 1e-6, 1e-6, gain)
    scale = (output * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp(min=1e-12)
    scale = torch.where(
        scale > 0,
        scale,
        output.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True).clamp(min=1e-6),
    )
    return scale * direction - output
