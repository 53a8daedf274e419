"""Passes of the model over rows of the pools, as it is trained and as it came."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.batching import by_length
from editunlearn.lm.head import Head, hidden_of, logits_of
from editunlearn.lm.hooks import on_output
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Batch, batch
from editunlearn.unlearners.losses import Scored
from editunlearn.unlearners.terms import Inside, View

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM
    from editunlearn.unlearners.parameters import Trained
    from editunlearn.unlearners.rows import Pool

States = tuple[Tensor, Tensor | None]
"""States before the head (n, width), and of a block (n, width) if asked for, where a label comes next."""


class Passes:
    """Views of rows.

    What the unedited model finds of facts to forget is kept, made in batches that do not depend on the order of
    training; of other rows it is found again in the very batch that is trained on. So an interrupted run goes on to
    the same bytes.
    """

    def __init__(self, lm: LM, trained: Trained, pools: Mapping[str, Pool], batch_tokens: int) -> None:
        self.lm, self.trained, self.pools, self.batch_tokens = lm, trained, pools, batch_tokens
        self.head = Head(lm)
        self._kept: dict[tuple[str, int | None], list[States]] = {}

    def view(self, pool: str, numbers: Sequence[int], layer: int | None = None) -> View:
        """The rows ``numbers`` of a pool; with gradients where they are enabled.

        Args:
            layer: block whose states are wanted, too.
        """
        rows, labels = self.pools[pool].rows, self.pools[pool].labels
        padded = batch([rows[i] for i in numbers], self.lm.pad_id, self.lm.device)
        if labels is not None:
            padded = replace(padded, labels=torch.cat([labels[i] for i in numbers]).to(self.lm.device))
        with self.trained.active():
            now, inside = self._states(padded, layer)
        found: list[States] = []

        def base() -> States:  # once, and only if something asks for it
            if not found:
                found.append(self._base(pool, numbers, padded, layer))
            return found[0]

        scored = self._scored(padded, len(numbers), lambda: now, lambda: self.head.kl(base()[0], now))
        unedited = self._scored(padded, len(numbers), lambda: base()[0])
        if layer is None or inside is None:
            return View(scored, unedited)
        before = base()[1]
        assert before is not None  # noqa: S101 - the same layer
        return View(scored, unedited, Inside(inside, before, padded.owners, len(numbers)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) of states before the head, differentiable."""
        weight = self.lm.head.weight
        if self.head.plain and isinstance(weight, Tensor):
            return (hidden.to(weight.device) @ weight.detach().T).to(self.lm.device)
        return logits_of(self.lm, hidden)

    def _scored(
        self, padded: Batch, count: int, states: Callable[[], Tensor], kl: Callable[[], Tensor] | None = None
    ) -> Scored:
        return Scored(
            padded.labels,
            padded.owners,
            count,
            logits=lambda: self.logits(states()),
            nll=lambda: self.head.cross_entropy(states(), padded.labels),
            kl=kl,
        )

    def _states(self, padded: Batch, layer: int | None) -> States:
        """Of the model as it computes now."""
        seen: list[Tensor] = []

        def see(_inputs: Tensor, output: Tensor) -> None:
            rows = output.reshape(*padded.input_ids.shape, -1)
            seen.append(rows[padded.targets.to(rows.device)].to(self.lm.device))

        with ExitStack() as hooks:
            if layer is not None:
                block = self.lm.layout.module(self.lm.model, self.lm.layout.block_name(layer))
                hooks.enter_context(on_output(block, see))
            hidden = hidden_of(self.lm, padded.targets, lambda: forward(self.lm.model, padded))
        return hidden, seen[0] if seen else None

    @torch.no_grad()
    def _base(self, pool: str, numbers: Sequence[int], padded: Batch, layer: int | None) -> States:
        if not self.pools[pool].each:
            return self._states(padded, layer)
        if (pool, layer) not in self._kept:
            self._kept[pool, layer] = self._all(pool, layer)
        rows = [self._kept[pool, layer][i] for i in numbers]
        inside = [states for _, states in rows if states is not None]
        return torch.cat([hidden for hidden, _ in rows]), torch.cat(inside) if inside else None

    def _all(self, pool: str, layer: int | None) -> list[States]:
        rows = self.pools[pool].rows
        found: dict[int, States] = {}
        for part in by_length([len(row.ids) for row in rows], self.batch_tokens):
            padded = batch([rows[i] for i in part], self.lm.pad_id, self.lm.device)
            hidden, inside = self._states(padded, layer)
            sizes = padded.owners.bincount(minlength=len(part)).tolist()
            insides = torch.split(inside, sizes) if inside is not None else [None] * len(part)
            hiddens = torch.split(hidden, sizes)
            found |= dict(zip(part, zip(hiddens, insides, strict=True), strict=True))
        return [found[i] for i in range(len(rows))]
