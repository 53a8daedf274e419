"""Relearning: a few steps of fine-tuning on some forgotten facts, or on related text, may bring the others back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from editunlearn.console import Console
from editunlearn.errors import InputError, NumericalError
from editunlearn.evaluation.attacks.quantisation import linear_maps
from editunlearn.lm.attention import short_rows
from editunlearn.lm.head import Head, hidden_of
from editunlearn.lm.hooks import frozen, on_output, stack
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Row, batch
from editunlearn.lm.weights import read_weight

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

RANK = 8
"""Of the adapter, when only an adapter is trained."""
RATES: Mapping[str, float] = MappingProxyType({"full": 1e-4, "lora": 1e-3})
"""Learning rates that bring much back: with 1e-4, five steps on half of the facts returned most of the other half on a
270M model. A rate that teaches too little would make every edit look like removal."""


@dataclass(frozen=True)
class Relearn:
    """How an attacker fine-tunes.

    Attributes:
        steps: updates of AdamW.
        lr: its rate, the same at every step; None: that of ``RATES``.
        batch: rows in one update, at most; so many that a few steps see most of what an attacker has.
        what: ``full``: the linear maps of all blocks, in float32; ``lora``: an adapter of rank 8 on each of them.
        seed: of the order of the rows and of the adapter's beginning.
    """

    steps: int = 10
    lr: float | None = None
    batch: int = 16
    what: Literal["full", "lora"] = "full"
    seed: int = 0

    @property
    def rate(self) -> float:
        """The rate that is used."""
        return self.lr if self.lr is not None else RATES[self.what]


@contextmanager
def relearned(lm: LM, rows: Sequence[Row], hp: Relearn, console: Console | None = None) -> Iterator[list[float]]:
    """The model as it computes now (with a delta applied, if one is), fine-tuned on the target tokens of ``rows``.

    What is learned is a float32 change of each linear map's output; the weights stay as they are, so that nothing needs
    to be restored and nothing that is learned is rounded away.

    Yields:
        the loss before each update, nats a token.

    Raises:
        InputError: no rows with a target, or no steps.
        NumericalError: the loss is not finite.
    """
    rows = [row for row in rows if row.prompt_length < len(row.ids)]
    if not rows or hp.steps < 1 or hp.batch < 1:
        raise InputError(
            f"relearning on {len(rows)} rows with a target, {hp.steps} steps, {hp.batch} a step: at least one of each."
        )
    draw = torch.Generator().manual_seed(hp.seed)
    changes = {name: _Change.of(read_weight(lm.model, name), hp.what, draw) for name in linear_maps(lm)}
    with stack([on_output(lm.layout.module(lm.model, name), change) for name, change in changes.items()]):
        bar = (console or Console(quiet=True)).progress(range(hp.steps), "relearning")
        with frozen(lm.model), short_rows(lm.device), bar as steps:
            losses = _train(lm, rows, hp, [p for change in changes.values() for p in change.factors], steps)
        with torch.no_grad():
            yield losses


@dataclass(frozen=True)
class _Change:
    """Added to a linear map: the product of its factors, the last one first; all trained, the first one from 0."""

    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight: Tensor, what: str, draw: torch.Generator) -> _Change:
        out, width = weight.shape
        zero = torch.zeros(out, width if what == "full" else RANK, device=weight.device)
        down = torch.randn(RANK, width, generator=draw) / math.sqrt(width)
        made = (zero,) if what == "full" else (zero, down.to(weight.device))
        return cls(tuple(p.requires_grad_(True) for p in made))

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        states = inputs.float()
        for factor in reversed(self.factors):
            states = states @ factor.T
        return (output.float() + states).to(output.dtype)


def _train(lm: LM, rows: Sequence[Row], hp: Relearn, parameters: Sequence[Tensor], steps: Iterable[int]) -> list[float]:
    head, order = Head(lm), _batches(len(rows), hp)
    adam = torch.optim.AdamW(parameters, lr=hp.rate, weight_decay=0.0)
    losses: list[float] = []
    for step in steps:
        padded = batch([rows[i] for i in order()], lm.pad_id, lm.device)
        with torch.enable_grad():
            states = hidden_of(lm, padded.targets, lambda p=padded: forward(lm.model, p))  # type: ignore[misc]
            loss = head.cross_entropy(states, padded.labels).mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NumericalError(f"relearning: the loss at step {step + 1} is not finite; try a smaller rate")
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return losses


def _batches(count: int, hp: Relearn) -> Callable[[], list[int]]:
    """Numbers of the rows of one update after the other; all come up before any comes twice."""
    draw, waiting = random.Random(hp.seed), list[int]()

    def take() -> list[int]:
        while len(waiting) < min(hp.batch, count):
            fresh = list(range(count))
            draw.shuffle(fresh)
            waiting.extend(fresh)
        return [waiting.pop(0) for _ in range(min(hp.batch, count))]

    return take
