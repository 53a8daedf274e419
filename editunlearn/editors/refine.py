"""Refine: train the left factors of a closed-form edit, with the right (key) factors fixed.

The closed form writes values that were found one fact at a time; what they do together, and to everything else, is
left to chance. Here a few tens of Adam steps improve what is wanted (the target over all contexts) and what is to stay
(the next-token distribution of the unedited model on prompts that must stay and on generic text). The change stays
low-rank and confined to the directions of the edited keys, which is what protects the rest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.editors.column_adam import ColumnAdam
from editunlearn.editors.objective import AtKeptKeys, Gradient, Keep, forget_loss, learned
from editunlearn.editors.schedule import Schedule
from editunlearn.errors import NumericalError
from editunlearn.lm.head import Head
from editunlearn.lm.hooks import low_rank_hook, on_output, stack
from editunlearn.lm.tokens import Row
from editunlearn.numerics import losses

if TYPE_CHECKING:
    from editunlearn.hparams import Refine
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace


CHECKPOINT = 5
"""Steps between two states that an interrupted run can go on from."""

SHARE, OF_EACH = 0.95, 0.5
"""Share of prompts never trained on that must give the target: of all facts together, and of each alone. A share of all
hides a fact that has not been learned at all."""

LEAST_ANSWER = 1e-3
"""A recogniser's answer to its own key counts as at least this, so that a dead one does not take endless steps."""


def step_units(left: Tensor, right: Tensor, keys: Tensor) -> Tensor:
    """By fact, the mean absolute left factor that would write its whole change, (n,).

    A recogniser answers less than 1 to its own key: the less, the more there is to preserve around it (a country's name
    far less than a rare person's). Its left factor has to grow by the inverse of that answer. Steps in this unit move
    all facts equally.

    Args:
        left: (d_out, n). right: (n, d_in). keys: (n, d_in), of the same facts.
    """
    answer = (right * keys).sum(-1)
    return left.abs().mean(0) / answer.clamp(LEAST_ANSWER, 1.0)


@dataclass(frozen=True)
class Goals:
    """What refine trains on.

    Attributes:
        forget: prompt with target for each fact and context, the bare prompt first.
        retain: pools of prompts to keep, scored where their rows say; a step takes from each by the root of its size.
        text: windows of generic text, all positions scored.
        unseen: the same in contexts that are not trained on, to see what was learned; may be empty.
        targets: how many different targets the facts have.
    """

    forget: Sequence[Sequence[Row]]
    retain: Sequence[Sequence[Row]]
    text: Sequence[Row]
    unseen: Sequence[Sequence[Row]] = ()
    targets: int = 1


def refine(
    lm: LM,
    factors: dict[str, tuple[Tensor, Tensor]],
    goals: Goals,
    hp: Refine,
    *,
    units: dict[str, Tensor],
    kept_keys: dict[str, Tensor],
    seed: int = 0,
    work: Workspace | None = None,
    already: Callable[[int], None] = lambda _: None,
    report: Callable[[int, int, float, float, float], None] = lambda *_: None,
    tell: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, Tensor]:
    """New left factors (d_out, r) for every module of ``factors`` (module -> (left, right)).

    Loss: NLL of the targets, each row weighted by its own NLL above ``hp.floor`` relative to the mean (so that the
    facts that resist get the attention) + ``hp.keeping(facts)`` * mean KL on retain prompts + ``hp.text_kl`` * mean KL
    on text + ``hp.kept_keys`` * the change at all keys to keep, relative to the closed form's. Adam on all left
    factors, in steps of ``hp.lr`` times the fact's unit that get smaller towards the end. There the facts are tried in
    contexts that were not trained on: while greedy decoding would not give nearly all of them their target, or one of
    them hardly ever, steps are added.

    Args:
        units: by module, (n,), what the steps of each fact are measured in: see :func:`step_units`.
        kept_keys: by module, (m, d_in), what the solve was to leave alone; m may be 0.
        work: keeps the state every few steps, so that an interrupted run goes on there.
        already: called with the number of steps that an interrupted run had made.
        report: called with (step, steps expected, NLL, retain KL, text KL) after every step.
        tell: called with a sentence when it is decided whether steps are added.
        warn: called with a sentence when a batch does not fit and is halved.

    Raises:
        NumericalError: a loss that is not finite.
    """
    left = {name: pair[0].to(lm.device).clone().requires_grad_(True) for name, pair in factors.items()}
    right = {name: pair[1].to(lm.device) for name, pair in factors.items()}
    optimiser = ColumnAdam(left, {name: unit.to(lm.device) for name, unit in units.items()})
    draw = _Draw(goals, hp, seed)
    gradient = Gradient(left, hp.tokens_at_once, warn)
    head = Head(lm)
    retain, generic = (
        Keep(head, [row for pool in goals.retain for row in pool], gradient),
        Keep(head, goals.text, gradient),
    )

    at_keys = AtKeptKeys(factors, kept_keys)

    def change() -> AbstractContextManager[None]:
        hooks = {name: low_rank_hook(left[name], right[name]) for name in left}
        return stack([on_output(lm.layout.module(lm.model, name), hook) for name, hook in hooks.items()])

    keep_weight = hp.keeping(len(goals.forget))
    many = len(goals.forget), goals.targets
    schedule = Schedule(hp.planned(*many), hp.most(*many))
    if work is not None and (kept_state := work.get("refine")):
        optimiser.load(kept_state)
        schedule.load(kept_state)
    start = optimiser.count
    already(start)
    step = 0
    while step < max(start, schedule.end):
        forget = draw.forget()
        kept_rows, text_rows = draw.retain(), draw.text()
        step += 1
        if step <= start:
            retain.remember(kept_rows)
            generic.remember(text_rows)
            continue
        with change():
            nll = forget_loss(head, forget, gradient, hp.floor)
        kept = retain.loss(change, kept_rows, keep_weight)
        text = generic.loss(change, text_rows, hp.text_kl)
        at_keys.loss(left, hp.kept_keys)
        loss = float(nll.mean())
        if not all(map(math.isfinite, (loss, kept, text))):
            raise NumericalError(f"refine: the loss at step {step} is not finite; try a smaller refine.lr")
        optimiser.step(hp.lr * schedule.rate(step - 1))
        if goals.unseen and schedule.may_grow(step):
            with change():
                shares = _shares(head, goals.unseen, gradient)
            if float(shares.mean()) < SHARE or float(shares.min()) < OF_EACH:
                schedule.grow()
            behind = int((shares < OF_EACH).sum())
            tell(
                f"refine: {float(shares.mean()):.1%} of unseen prompts give their target after {step} steps "
                f"({behind} facts behind fewer than half); {schedule.end} steps in all"
            )
        if work is not None and step % CHECKPOINT == 0:
            work.put("refine", {**optimiser.state(), **schedule.state()})
        report(step, schedule.end, loss, kept, text)
    return {name: value.detach().cpu() for name, value in left.items()}


def _shares(head: Head, facts: Sequence[Sequence[Row]], gradient: Gradient) -> Tensor:
    """Of each fact the share of its prompts behind which greedy decoding would write the target, (facts,)."""
    rows = [row for fact in facts for row in fact]
    owner = torch.tensor([number for number, fact in enumerate(facts) for _ in fact])
    return losses.mean_by(learned(head, rows, gradient), owner, len(facts))


class _Draw:
    """Seeded choice of what each step sees; a pool is gone through in shuffled order before anything comes twice."""

    def __init__(self, goals: Goals, hp: Refine, seed: int) -> None:
        self.goals, self.hp = goals, hp
        self.random = random.Random(seed)
        self.waiting: dict[str, list[int]] = {}

    def _next(self, pool: str, size: int, count: int) -> list[int]:
        queue = self.waiting.setdefault(pool, [])
        while len(queue) < min(count, size):
            fresh = list(range(size))
            self.random.shuffle(fresh)
            queue.extend(fresh)
        return [queue.pop(0) for _ in range(min(count, size))]

    def forget(self) -> list[list[Row]]:
        """For each fact of the step its bare prompt and some of its prefixed ones."""
        chosen = []
        for i in self._next("forget", len(self.goals.forget), self.hp.forget_batch):
            rows = list(self.goals.forget[i])
            others = self.random.sample(rows[1:], min(len(rows) - 1, self.hp.contexts - 1))
            chosen.append([rows[0], *others])
        return chosen

    def retain(self) -> list[int]:
        """Numbers of the prompts to keep, counted through all pools."""
        chosen: list[int] = []
        start, left = 0, self.hp.prompts(len(self.goals.forget))
        sizes = [len(pool) for pool in self.goals.retain if pool]
        for number, size in enumerate(sizes):
            # as many as the root of the pool's size: a large pool has more to say, a small one must not be left out
            share = round(left * size**0.5 / sum(rest**0.5 for rest in sizes[number:]))
            part = self._next(f"retain {number}", size, max(1, share))
            chosen += [start + i for i in part]
            start, left = start + size, left - len(part)
        return chosen

    def text(self) -> list[int]:
        """Numbers of the text windows."""
        return self._next("text", len(self.goals.text), self.hp.text_batch)
