"""A change of whole matrices while it is trained: float32 beside the model, whose own weights are never written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from editunlearn.deltas.arithmetic import merged_weight
from editunlearn.deltas.lowrank import Dense, LoadedModel, frobenius
from editunlearn.lm.weights import is_transposed, module, read_weight


class Changes:
    """A change of each entry of some matrices.

    Attributes:
        values: dW (out, in) float32 by module name, from zero.
        units: root mean square of each weight.
        leaves: what the graph of a pass ends in.
    """

    def __init__(self, lm: LoadedModel, names: Sequence[str]) -> None:
        self.lm, self.names = lm, list(names)
        base = {name: read_weight(lm.model, name) for name in names}
        self.values = {name: torch.zeros(w.shape, device=w.device) for name, w in base.items()}
        self.units = {name: frobenius(weight) / math.sqrt(weight.numel()) for name, weight in base.items()}
        own = {name: module(lm.model, name)._parameters["weight"] for name in names}
        self._live = {name: nn.Parameter(weight.detach().clone()) for name, weight in own.items() if weight is not None}
        self._turned = {name: is_transposed(lm.model, name) for name in names}

    @property
    def leaves(self) -> list[Tensor]:
        """The weights that the model computes with, in the order of ``names``."""
        return [self._live[name] for name in self.names]

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model with the change in it."""
        with ExitStack() as undo:
            for name in self.names:
                slots = module(self.lm.model, name)._parameters
                undo.callback(slots.__setitem__, "weight", slots["weight"])
                slots["weight"] = self._live[name]
            yield

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Sum up gradients of ``leaves``."""
        for name, found in zip(self.names, gradients, strict=True):
            if found is not None:
                accumulate(self.values[name], found.t() if self._turned[name] else found)

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the model compute with the values as they are now."""
        for name in self.names:
            merged = merged_weight(read_weight(self.lm.model, name), self.values[name], None)
            self._live[name].copy_(merged.t() if self._turned[name] else merged)

    def updates(self) -> dict[str, Dense]:
        """The change of each module so far, a copy."""
        return {name: Dense(value.detach().clone()) for name, value in self.values.items()}

    def relative_norm(self) -> float:
        """Largest norm(dW) / norm(W) of any module."""
        sizes = {name: self.units[name] * math.sqrt(value.numel()) for name, value in self.values.items()}
        return max(frobenius(value) / max(sizes[name], 1e-30) for name, value in self.values.items())


def accumulate(value: Tensor, gradient: Tensor) -> None:
    """Add to the gradient of a float32 value."""
    value.grad = gradient.float().clone() if value.grad is None else value.grad.add_(gradient)


def optimiser_state(adam: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values, and what Adam knows of each, under names that :func:`restore` reads."""
    state = {f"value.{name}": value for name, value in values.items()}
    for name, value in values.items():
        state |= {f"adam.{key}.{name}": tensor for key, tensor in adam.state.get(value, {}).items()}
    return state


@torch.no_grad()
def restore(adam: torch.optim.Optimizer, values: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimiser_state` gave."""
    for name, value in values.items():
        value.copy_(state[f"value.{name}"])
        if f"adam.step.{name}" in state:  # a value that never had a gradient has none
            own = {key: state[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            adam.state[value] = {k: t if k == "step" else t.to(value.device) for k, t in own.items()}
