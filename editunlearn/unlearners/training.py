"""The training loop of every unlearner: plain torch, resumable to the same bytes, and it knows when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.deltas.changes import optimiser_state, restore
from editunlearn.errors import NumericalError
from editunlearn.lm.attention import short_rows
from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.hooks import frozen
from editunlearn.lm.tokens import Row
from editunlearn.unlearners import losses, parameters
from editunlearn.unlearners.passes import Passes
from editunlearn.unlearners.rows import Draw
from editunlearn.unlearners.terms import Price, Term, View

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.hparams import UnlearnerHParams
    from editunlearn.unlearners.parameters import Trained
    from editunlearn.workspace import Workspace

STATE = "training"
"""Name of the unfinished training in a workspace."""
WORK_PER_SAVING = 20.0
"""An unfinished training is kept when so many times as long as that takes went by."""


class Diverged(NumericalError):
    """The training went wrong; what it was before that is in ``good``.

    Attributes:
        reason: what went wrong, at which update.
        good: the change after the last epoch that was still well, None before the first.
        updates: made until then.
    """

    def __init__(self, reason: str, good: dict[str, Tensor] | None, updates: int) -> None:
        super().__init__(reason)
        self.reason, self.good, self.updates = reason, good, updates


@dataclass(frozen=True)
class Ended:
    """How a training ended.

    Attributes:
        updates: made, also before an interruption.
        why: one phrase.
        losses: mean of each term over the last epoch.
        tokens: that passed the trained model with gradients, padding included.
    """

    updates: int
    why: str
    losses: dict[str, float]
    tokens: int


@dataclass
class Training:
    """One training; the attributes are what its parts share.

    Attributes:
        masks: by name of a value, which entries are trained; others stay.
    """

    passes: Passes
    trained: Trained
    terms: Sequence[Term]
    hp: UnlearnerHParams
    work: Workspace
    console: Console
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        train, pools = self.hp.train, self.passes.pools
        free = {name: len(pool.rows) for name, pool in pools.items() if not pool.each}
        facts = next(len(pool.rows) // pool.each for pool in pools.values() if pool.each)
        self.draw = Draw(facts, train.batch, free, self.hp.seed)
        self.total = train.epochs * self.draw.updates
        groups = [{"params": [value], "lr": self.rate(name)} for name, value in self.trained.values.items()]
        self.adam = torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay)
        self.prices = {t.name: t.weight.start for t in self.terms if isinstance(t.weight, Price)}
        self.done, self.tokens = 0, 0
        self.sums: dict[str, float] = {}
        self.good: dict[str, Tensor] | None = None
        self.good_at = 0
        self._saved, self._writing = time.monotonic(), 0.0

    def rate(self, name: str) -> float:
        """Learning rate of a value at full height."""
        train = self.hp.train
        return train.lr * (self.trained.units[name] if train.scale == "relative" else 1.0)

    def run(self) -> Ended:
        """Train to the end.

        Raises:
            Diverged: a loss, gradient or change that is not finite, or a change above ``limits.norm``.
        """
        self._resume()
        start, why = self.done, "all epochs done"
        with (
            frozen(self.passes.lm.model),
            short_rows(self.passes.lm.device),
            self.console.progress(self.total, "training (updates)") as bar,
        ):
            bar.update(start)
            step = 0
            for epoch in range(self.hp.train.epochs):
                for facts in self.draw.epoch():
                    if step > start:
                        self._save()  # not before the epoch's end was dealt with
                    step += 1
                    plan = [self._rows(term, facts) for term in self.terms]
                    if step <= start:
                        continue  # drawn all the same, so that what comes is the same
                    found = self._update(plan, step)
                    self._sum(found)
                    self.done = step
                    bar.update(1)
                    shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                    self.console.detail(f"update {step}: {shown}", level=2)
                if step > start:
                    self._end_epoch(epoch)
                    if self._enough(epoch):
                        why = f"enough is forgotten after {epoch + 1} epochs (stop.probability)"
                        break
        self.console.info(f"training: {self.done} updates on {self.tokens:,} tokens; {why}")
        return Ended(self.done, why, self._means(), self.tokens)

    # --- one update

    def _rows(self, term: Term, facts: Sequence[int]) -> list[list[int]]:
        """For each pool of a term the numbers of its rows; items of a term stand at the same place."""
        pools = self.passes.pools
        if not pools[term.pools[0]].each:
            count = round(len(facts) * term.ratio)
            return [self.draw.numbers(name, count) for name in term.pools]
        return [self.draw.one_of(pools[name].each, facts) for name in term.pools]

    def _update(self, plan: Sequence[list[list[int]]], step: int) -> dict[str, float]:
        self.adam.zero_grad(set_to_none=True)
        found = {}
        for term, numbers in zip(self.terms, plan, strict=True):
            found[term.name] = self._term(term, numbers)
        if not all(map(math.isfinite, found.values())):
            name = next(name for name, value in found.items() if not math.isfinite(value))
            raise self._diverged(f"the {name} loss is {found[name]} at update {step}")
        parameters.restrict(self.trained, self.masks)
        self._clip(step)
        factor = self._schedule(step)
        for group, name in zip(self.adam.param_groups, self.trained.values, strict=True):
            group["lr"] = factor * self.rate(name)
        self.adam.step()
        self.trained.refresh()
        return found

    def _term(self, term: Term, numbers: list[list[int]]) -> float:
        """Mean loss of a term over its rows; its gradient is added to the values."""
        count = len(numbers[0])
        weight = self.prices.get(term.name) if isinstance(term.weight, Price) else term.weight
        shared = self._shared(term, numbers)
        total = [0.0]

        def run(part: Sequence[int]) -> None:
            with torch.enable_grad():
                views = [
                    self.passes.view(pool, [row[i] for i in part], term.layer)
                    for pool, row in zip(term.pools, numbers, strict=True)
                ]
                each = term.loss(*views, *shared)
                loss = each.sum() / count
            value = float(loss.detach())
            if weight and loss.requires_grad:
                gradients = torch.autograd.grad(weight * loss, self.trained.leaves, allow_unused=True)
                self.trained.add(gradients)  # only now: a batch that does not fit has added nothing
            total[0] += value
            self.tokens += sum(max(len(rows[i].ids) for i in part) * len(part) for rows in self._at(term, numbers))

        self._batches(term, numbers, run)
        return total[0]

    def _shared(self, term: Term, numbers: list[list[int]]) -> list[Tensor]:
        """What a term's loss gets last: a mean over all rows of the update, as it is now."""
        if term.shared is None:
            return []
        found: list[Tensor] = []

        def run(part: Sequence[int]) -> None:
            views = [self.passes.view(p, [row[i] for i in part]) for p, row in zip(term.pools, numbers, strict=True)]
            assert term.shared is not None  # noqa: S101 - it was asked above
            found.append(term.shared(*views))

        with torch.no_grad():
            self._batches(term, numbers, run)
        return [torch.cat(found).mean()]

    def _at(self, term: Term, numbers: list[list[int]]) -> list[list[Row]]:
        """For each pool of a term its rows."""
        pools = self.passes.pools
        return [[pools[pool].rows[number] for number in row] for pool, row in zip(term.pools, numbers, strict=True)]

    def _batches(self, term: Term, numbers: list[list[int]], run: Callable[[Sequence[int]], None]) -> None:
        """Call ``run`` with the places of the items of one batch after the other."""
        rows = self._at(term, numbers)
        lengths = [sum(len(of_pool[i].ids) for of_pool in rows) for i in range(len(numbers[0]))]
        halving(by_length(lengths, self.hp.tokens_at_once), run, self.console.warn)

    def _clip(self, step: int) -> None:
        gradients = [value.grad for value in self.trained.values.values() if value.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient is not finite at update {step}")
        if self.hp.train.clip is not None and norm > self.hp.train.clip:
            for gradient in gradients:
                gradient.mul_(self.hp.train.clip / norm)

    def _schedule(self, step: int) -> float:
        """Share of the full rate at an update, the first being 1."""
        return schedule(step, self.total, self.hp.train.schedule, self.hp.train.warmup)

    # --- one epoch

    def _sum(self, found: Mapping[str, float]) -> None:
        for name, value in {**found, "": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _means(self) -> dict[str, float]:
        count = self.sums.get("", 0.0)
        return {name: value / count for name, value in self.sums.items() if name and count}

    def _end_epoch(self, epoch: int) -> None:
        """Prices move, and what is well is remembered."""
        means = self._means()
        norm, limit = self.trained.relative_norm(), self.hp.limits.norm
        if not math.isfinite(norm) or (limit is not None and norm > limit):
            raise self._diverged(
                f"after epoch {epoch + 1} the change is {norm:.3g} times as large as a weight, "
                f"above limits.norm ({limit})"
            )
        self.good = {name: value.detach().clone() for name, value in self.trained.values.items()}
        self.good_at = self.done
        for term in self.terms:
            if isinstance(term.weight, Price) and epoch + 1 > term.weight.warmup:
                price = term.weight
                moved = losses.ascended(self.prices[term.name], means[term.name], price.allowed, price.rate)
                self.prices[term.name] = moved
        shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.console.detail(f"epoch {epoch + 1}: {shown}; largest change {norm:.3%} of its weight")
        if epoch + 1 < self.hp.train.epochs:
            self.sums = {}

    @torch.no_grad()
    def _enough(self, epoch: int) -> bool:
        """The rule "forget at least as well as X"."""
        rule = self.hp.stop
        if rule is None or (epoch + 1) % rule.every:
            return False
        found = self.probability()
        self.console.detail(f"epoch {epoch + 1}: mean probability of the true answers {found:.4g}")
        return found <= rule.probability

    @torch.no_grad()
    def probability(self) -> float:
        """Mean probability of the true answers to forget, product over their tokens, in [0, 1]."""
        rows = self.passes.pools["forget"].rows
        found: list[Tensor] = []

        def run(part: Sequence[int]) -> None:
            now = self.passes.view("forget", part).now
            found.append((-now.sum(now.nll)).exp())

        halving(by_length([len(row.ids) for row in rows], self.hp.tokens_at_once), run, self.console.warn)
        return float(torch.cat(found).mean())

    # --- interruptions

    def _diverged(self, reason: str) -> Diverged:
        advice = "the training diverged. Try a smaller train.lr or fewer epochs."
        return Diverged(f"{reason}: {advice}", self.good, self.good_at)

    def _save(self) -> None:
        """Keep the state, as often as writing it costs a twentieth of the time."""
        began = time.monotonic()
        if began - self._saved < WORK_PER_SAVING * self._writing:
            return
        numbers = {"done": self.done, "tokens": self.tokens, **{f"price.{n}": p for n, p in self.prices.items()}}
        numbers |= {f"sum.{name}": value for name, value in self.sums.items()}
        state = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        state |= optimiser_state(self.adam, self.trained.values)
        self.work.put(STATE, state)
        self._saved = time.monotonic()
        self._writing = self._saved - began

    @torch.no_grad()
    def _resume(self) -> None:
        state = self.work.get(STATE)
        if state is None:
            return
        self.done, self.tokens = int(state["done"]), int(state["tokens"])
        self.prices = {name: float(state[f"price.{name}"]) for name in self.prices}
        self.sums = {key.removeprefix("sum."): float(v) for key, v in state.items() if key.startswith("sum.")}
        restore(self.adam, self.trained.values, state)
        self.good = {name: value.detach().clone() for name, value in self.trained.values.items()}
        self.good_at = self.done
        self.trained.refresh()
        self.console.info(f"training: going on after {self.done} updates")


def schedule(step: int, total: int, kind: str, warmup: float) -> float:
    """Share of the full learning rate at update ``step`` of ``total``, the first being 1.

    Args:
        kind: constant, linear (to 0 behind the last update) or cosine.
        warmup: share of the updates in which it rises.
    """
    rising = math.ceil(warmup * total)
    if step <= rising:
        return step / (rising + 1)
    way = (step - 1 - rising) / max(1, total - rising)
    return {"constant": 1.0, "linear": 1 - way, "cosine": 0.5 * (1 + math.cos(math.pi * way))}[kind]


def gradients(
    passes: Passes,
    trained: Trained,
    pool: str,
    loss: Callable[[View], Tensor],
    batch_tokens: int,
    warn: Callable[[str], None],
    numbers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Gradient of the mean loss of a pool's rows with respect to each value, without changing anything.

    Args:
        numbers: of the rows; default: all.
    """
    rows = passes.pools[pool].rows
    numbers = list(range(len(rows))) if numbers is None else list(numbers)

    def run(part: Sequence[int]) -> None:
        with torch.enable_grad():
            found = loss(passes.view(pool, [numbers[i] for i in part])).sum() / len(numbers)
            trained.add(torch.autograd.grad(found, trained.leaves, allow_unused=True))

    with frozen(passes.lm.model), short_rows(passes.lm.device):
        halving(by_length([len(rows[i].ids) for i in numbers], batch_tokens), run, warn)
    result = {}
    for name, value in trained.values.items():
        result[name] = value.grad if value.grad is not None else torch.zeros_like(value)
        value.grad = None
    return result
