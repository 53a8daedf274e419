"""What is trained: a float32 change of whole matrices, or LoRA factors. The model's own weights are never written.

While a change is trained, the model computes in its own dtype with the weights that a merge would give it, rounded
once; gradients and the optimiser's state are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editunlearn.deltas.changes import Changes, accumulate
from editunlearn.deltas.lowrank import Factors, base_norm
from editunlearn.errors import InputError
from editunlearn.lm.hooks import low_rank_hook, on_output, stack
from editunlearn.lm.layers import resolve_layers
from editunlearn.lm.weights import device_of, linear_maps, module, shape

if TYPE_CHECKING:
    from editunlearn.hparams import Train, UnlearnerHParams
    from editunlearn.lm.layout import Layout
    from editunlearn.lm.loading import LM


def trained_modules(model: nn.Module, layout: Layout, hp: UnlearnerHParams) -> tuple[list[str], str]:
    """Names of the linear maps that ``hp`` trains, and where the choice comes from.

    Raises:
        InputError: blocks that the model does not have, or an end of a name that no linear map has.
    """
    count = layout.num_layers(model)
    layers, why = resolve_layers(hp.layers, count, hp.auto_layers(count))
    inside = [name for name in linear_maps(model, layout.blocks) if layout.layer_of(name) in layers]
    ends = hp.train.modules
    unknown = [end for end in ends if not any(_ends(name, end) for name in inside)]
    if unknown:
        known = sorted({name.split(f"{layout.block_name(layout.layer_of(name))}.", 1)[1] for name in inside})
        raise InputError(
            f"train.modules: no linear map's name ends in {', '.join(map(repr, unknown))}. "
            f"A block has {', '.join(known)}."
        )
    chosen = [name for name in inside if not ends or any(_ends(name, end) for end in ends)]
    return chosen, f"auto: {len(layers)} of {count} blocks" if hp.layers == "auto" else why


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


class Adapters:
    """LoRA (arXiv 2106.09685) beside some linear maps: alpha / rank times ``left @ right``, ``left`` from zero.

    Beside packed quantised weights it works as well.

    Attributes:
        values: ``{module}.left`` (out, r) and ``{module}.right`` (r, in), float32.
        units: sizes of a relative step, such that dW moves like the weight itself would.
    """

    def __init__(self, lm: LM, names: Sequence[str], hp: Train, seed: int) -> None:
        self.lm, self.names, self.scale = lm, list(names), hp.alpha / hp.rank
        self.values: dict[str, Tensor] = {}
        self.units: dict[str, float] = {}
        self.start: dict[str, Factors] = {}
        draw = torch.Generator().manual_seed(seed)
        for name in names:
            target = module(lm.model, name)
            out, width = shape(lm.model, name)
            device = device_of(target)
            bound = 1 / math.sqrt(width)  # as in peft: kaiming_uniform with a = sqrt(5)
            right = torch.empty(hp.rank, width).uniform_(-bound, bound, generator=draw)
            self.put(name, torch.zeros(out, hp.rank, device=device), right.to(device))

    def put(self, name: str, left: Tensor, right: Tensor) -> None:
        """Begin with these factors; what they add up to at the beginning is no part of the change."""
        self.values[f"{name}.left"] = left.float().contiguous().requires_grad_(True)
        self.values[f"{name}.right"] = right.float().contiguous().requires_grad_(True)
        norm = base_norm(self.lm.model, name)
        rows, width = left.shape[0], right.shape[1]
        own = norm / math.sqrt(rows * width) if norm else 1 / math.sqrt(width)
        spread = float(right.detach().float().square().mean().sqrt())
        self.units[f"{name}.right"] = spread
        self.units[f"{name}.left"] = own / (self.scale * math.sqrt(left.shape[1]) * max(spread, 1e-30))
        if bool(left.any()):
            self.start[name] = Factors(left.float().clone(), right.float().clone())

    @property
    def leaves(self) -> list[Tensor]:
        """The factors themselves."""
        return list(self.values.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model with the adapters beside it."""
        hooks = []
        for name in self.names:
            left, right = self._pair(name)
            hooks.append(on_output(module(self.lm.model, name), low_rank_hook(left, right)))
        with stack(hooks):
            yield

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        left, right = self.scale * self.values[f"{name}.left"], self.values[f"{name}.right"]
        if name not in self.start:
            return left, right
        start = self.start[name]
        return torch.cat([left, -self.scale * start.left], 1), torch.cat([right, start.right])

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Sum up gradients of ``leaves``."""
        for value, found in zip(self.leaves, gradients, strict=True):
            if found is not None:
                accumulate(value, found)

    def refresh(self) -> None:
        """Nothing to do: the factors are what the model computes with."""

    def updates(self) -> dict[str, Factors]:
        """The change of each module so far, a copy."""
        pairs = {name: self._pair(name) for name in self.names}
        return {n: Factors(left.detach().clone(), right.detach().clone()) for n, (left, right) in pairs.items()}

    def relative_norm(self) -> float:
        """Largest norm(dW) / norm(W) of any module whose weights can be read."""
        norms = {name: base_norm(self.lm.model, name) for name in self.names}
        return max((u.norm() / norm for name, u in self.updates().items() if (norm := norms[name])), default=0.0)


Trained = Changes | Adapters


def of(lm: LM, names: Sequence[str], hp: Train, seed: int) -> Trained:
    """What ``hp`` trains at some modules."""
    return Adapters(lm, names, hp, seed) if hp.what == "lora" else Changes(lm, names)


def restrict(trained: Trained, masks: Mapping[str, Tensor]) -> None:
    """Drop the gradient of all entries whose mask, bool and broadcast to the value, is False."""
    for name, mask in masks.items():
        if (found := trained.values[name].grad) is not None:
            found.mul_(mask)
