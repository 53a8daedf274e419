"""Adam with one second moment per fact: the step of a fact's left factor keeps the direction of its gradient.

Plain Adam divides every coordinate by its own gradient's size, so that coordinates which carry little but noise move
as far as the ones that matter. On left factors that noise adds up to a large change of the weights that does not help
the target and harms the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FIRST, SECOND, EPSILON = 0.9, 0.99, 1e-12


class ColumnAdam:
    """Steps of left factors (d_out, n), column by column.

    Args:
        left: the tensors to change in place, by name; their ``grad`` is read.
        sizes: root mean square of each column's step at rate 1, (n,), by name.
    """

    def __init__(self, left: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> None:
        self.left, self.sizes, self.count = left, sizes, 0
        self.first = {name: torch.zeros_like(value) for name, value in left.items()}
        self.second = {name: torch.zeros_like(value[:1]) for name, value in left.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at ``rate``; gradients are cleared."""
        self.count += 1
        for name, value in self.left.items():
            if value.grad is None:
                continue
            self.first[name].lerp_(value.grad, 1 - FIRST)
            self.second[name].lerp_(value.grad.square().mean(0, keepdim=True), 1 - SECOND)
            mean = self.first[name] / (1 - FIRST**self.count)
            size = (self.second[name] / (1 - SECOND**self.count)).sqrt()
            value -= rate * self.sizes[name] * mean / (size + EPSILON)
            value.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, the left factors included."""
        kept = {"step": torch.tensor(self.count)}
        for name, value in self.left.items():
            kept |= {f"{name}.left": value, f"{name}.first": self.first[name], f"{name}.second": self.second[name]}
        return kept

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""
        self.count = int(state["step"])
        for name, value in self.left.items():
            value.copy_(state[f"{name}.left"])
            self.first[name].copy_(state[f"{name}.first"])
            self.second[name].copy_(state[f"{name}.second"])
