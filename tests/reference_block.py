"""UnKE's second stage (arXiv 2405.15349) written down literally: float64, one unpadded row at a time, AdamW by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Goal = tuple[tuple[int, ...], Tensor, Tensor]
"""Tokens of a row, what the block is to give (length, width), and the weight of each token (length)."""


class UnkeBlock:
    """A float64 copy of a model and one of its blocks."""

    def __init__(self, lm: Any, name: str) -> None:
        self.lm, self.model = lm, copy.deepcopy(lm.model).double()
        self.block = self.model.get_submodule(name)
        kinds = ("Linear", "Conv1D")
        self.maps = {f"{name}.{n}": m for n, m in self.block.named_modules() if type(m).__name__ in kinds}
        for module in self.maps.values():
            module.weight.requires_grad_(True)

    def outputs(self, ids: Sequence[int]) -> Tensor:
        """(length, width) of the block, in a whole pass of the model over one row."""
        seen: list[Any] = []
        handle = self.block.register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            self.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        finally:
            handle.remove()
        states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        return states.reshape(len(ids), -1)  # type: ignore[no-any-return]

    def goals(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...], Tensor | None, float]]) -> list[Goal]:
        """The outputs as they are, with a change at some tokens; (ids, tokens, changes, weight elsewhere)."""
        found = []
        for ids, at, move, elsewhere in rows:
            wanted = self.outputs(ids).detach().clone()
            weight = torch.full((len(ids),), elsewhere, dtype=torch.float64)
            for place, token in enumerate(at):
                assert move is not None
                wanted[token] += move[place].double()
                weight[token] = 1.0
            found.append((ids, wanted, weight))
        return found

    def loss(self, facts: list[Goal], kept: list[Goal], share: float, moves: Sequence[Tensor]) -> Tensor:
        """MSE at the facts' tokens + share * MSE at those to keep, in units of the mean square of the changes."""
        total = torch.zeros((), dtype=torch.float64)
        for goals, factor in ((facts, 1.0), (kept, share)):
            tokens = sum(float(weight.sum()) for _, _, weight in goals)
            for ids, wanted, weight in goals:
                for now, then, one in zip(self.outputs(ids), wanted, weight, strict=True):
                    total = total + factor * one * ((now - then) ** 2).mean() / tokens
        return total / torch.cat(list(moves)).double().square().mean()

    def train(
        self,
        facts: list[Goal],
        kept: list[Goal],
        share: float,
        moves: Sequence[Tensor],
        *,
        lr: float,
        decay: float,
        steps: int,
    ) -> dict[str, Tensor]:
        """AdamW (arXiv 1711.05101) with the decay on the change; dW (out, in) of each linear map."""
        base = {name: m.weight.detach().clone() for name, m in self.maps.items()}
        first = {name: torch.zeros_like(w) for name, w in base.items()}
        second = {name: torch.zeros_like(w) for name, w in base.items()}
        for t in range(1, steps + 1):
            weights = [m.weight for m in self.maps.values()]
            gradients = torch.autograd.grad(self.loss(facts, kept, share, moves), weights)
            for (name, module), gradient in zip(self.maps.items(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                change = (module.weight.detach() - base[name]) * (1 - lr * decay)
                hat = first[name] / (1 - 0.9**t), second[name] / (1 - 0.999**t)
                module.weight.data = base[name] + change - lr * hat[0] / (hat[1].sqrt() + 1e-8)
        found = {name: module.weight.detach() - base[name] for name, module in self.maps.items()}
        return {name: c.T if self.lm.layout.is_transposed(self.lm.model, name) else c for name, c in found.items()}
