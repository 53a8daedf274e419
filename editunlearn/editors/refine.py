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

from editunlearn.errors import NumericalError
from editunlearn.lm.batching import by_length
from editunlearn.lm.hooks import on_input, on_output, stack
from editunlearn.lm.likelihood import logits_of, target_logits
from editunlearn.lm.tokens import Batch, Row, batch
from editunlearn.numerics import losses

if TYPE_CHECKING:
    from editunlearn.hparams import Refine
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace


CHECKPOINT = 5
"""Steps between two states that an interrupted run can go on from."""


@dataclass(frozen=True)
class Goals:
    """What refine trains on.

    Attributes:
        forget: prompt with target for each fact and context, the bare prompt first.
        retain: prompts to keep, scored where ``keep_rows`` says.
        text: windows of generic text, all positions scored.
    """

    forget: Sequence[Sequence[Row]]
    retain: Sequence[Row]
    text: Sequence[Row]


def low_rank_hook(left: Tensor, right: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """``y + (x right^T) left^T`` in float32, rounded once to the dtype of ``y``; left (d_out, r), right (r, d_in)."""

    def change(inputs: Tensor, output: Tensor) -> Tensor:
        return (output.float() + (inputs.float() @ right.T) @ left.T).to(output.dtype)

    return change


def refine(
    lm: LM,
    factors: dict[str, tuple[Tensor, Tensor]],
    goals: Goals,
    hp: Refine,
    *,
    seed: int = 0,
    work: Workspace | None = None,
    already: Callable[[int], None] = lambda _: None,
    report: Callable[[int, float, float, float], None] = lambda *_: None,
) -> dict[str, Tensor]:
    """New left factors (d_out, r) for every module of ``factors`` (module -> (left, right)).

    Loss: NLL of the targets (a fact at or below ``hp.floor`` no longer counts) + ``hp.kl`` * mean KL on retain prompts
    + ``hp.text_kl`` * mean KL on text. Adam on all left factors, step ``hp.lr`` times the mean absolute left factor of
    the module, cosine decay.

    Args:
        work: keeps the state every few steps, so that an interrupted run goes on there.
        already: called with the number of steps that an interrupted run had made.
        report: called with (step, NLL, retain KL, text KL) after every step.

    Raises:
        NumericalError: a loss that is not finite.
    """
    left = {name: pair[0].to(lm.device).clone().requires_grad_(True) for name, pair in factors.items()}
    right = {name: pair[1].to(lm.device) for name, pair in factors.items()}
    sizes = {name: float(value.detach().abs().mean()) for name, value in left.items()}
    optimiser = torch.optim.Adam(
        [{"params": [value], "lr": hp.lr * sizes[name]} for name, value in left.items()]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / hp.steps))
    )
    draw = _Draw(goals, hp, seed)
    retain, generic = _Keep(lm, goals.retain), _Keep(lm, goals.text)

    def change() -> AbstractContextManager[None]:
        hooks = {name: low_rank_hook(left[name], right[name]) for name in left}
        return stack([on_output(lm.layout.module(lm.model, name), hook) for name, hook in hooks.items()])

    start = _restore(work, left, optimiser)
    already(start)
    for step in range(hp.steps):
        batch_of_step = draw.forget(), draw.retain(), draw.text()
        if step < start:
            schedule.step()
            continue
        optimiser.zero_grad()
        with change():
            nll = _forget(lm, batch_of_step[0], hp)
        kept = retain.loss(change, batch_of_step[1], hp.kl, hp)
        text = generic.loss(change, batch_of_step[2], hp.text_kl, hp)
        if not all(map(math.isfinite, (nll, kept, text))):
            raise NumericalError(
                f"refine: the loss at step {step + 1} is not finite; try a smaller refine.lr"
            )
        optimiser.step()
        schedule.step()
        if work is not None and (step + 1) % CHECKPOINT == 0:
            _keep_state(work, step + 1, left, optimiser)
        report(step, nll, kept, text)
    return {name: value.detach().cpu() for name, value in left.items()}


def _keep_state(
    work: Workspace, step: int, left: dict[str, Tensor], optimiser: torch.optim.Optimizer
) -> None:
    state = {"step": torch.tensor(step)}
    for name, value in left.items():
        adam = optimiser.state[value]
        state |= {
            f"{name}.left": value,
            f"{name}.first": adam["exp_avg"],
            f"{name}.second": adam["exp_avg_sq"],
        }
    work.put("refine", state)


def _restore(work: Workspace | None, left: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
    """Put back the state that was kept last; returns the number of steps done."""
    kept = work.get("refine") if work is not None else None
    if kept is None:
        return 0
    for name, value in left.items():
        value.data.copy_(kept[f"{name}.left"])
        moments = {
            "exp_avg": kept[f"{name}.first"].to(value.device),
            "exp_avg_sq": kept[f"{name}.second"].to(value.device),
        }
        optimiser.state[value] = {"step": kept["step"].float(), **moments}
    return int(kept["step"])


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
        """For each fact of the step: its bare prompt and some of its prefixed ones."""
        chosen = []
        for i in self._next("forget", len(self.goals.forget), self.hp.forget_batch):
            rows = list(self.goals.forget[i])
            others = self.random.sample(rows[1:], min(len(rows) - 1, self.hp.contexts - 1))
            chosen.append([rows[0], *others])
        return chosen

    def retain(self) -> list[int]:
        """Numbers of the prompts to keep."""
        return self._next("retain", len(self.goals.retain), self.hp.retain_batch)

    def text(self) -> list[int]:
        """Numbers of the text windows."""
        return self._next("text", len(self.goals.text), self.hp.text_batch)


def _forget(lm: LM, facts: Sequence[Sequence[Row]], hp: Refine) -> float:
    """Mean NLL of the targets; its gradient is added to the left factors, batch by batch."""
    rows = [(row, i) for i, fact in enumerate(facts) for row in fact]
    weight = torch.tensor([1 / (len(facts[i]) * len(facts)) for _, i in rows], device=lm.device)
    total = 0.0
    for part in by_length([len(r.ids) for r, _ in rows], hp.batch_tokens):
        padded = batch([rows[i][0] for i in part], lm.pad_id, lm.device)
        token = losses.cross_entropy(target_logits(lm, padded), padded.labels)
        nll = losses.mean_by(token, padded.owners, len(part))
        ((nll - hp.floor).clamp(min=0) * weight[part]).sum().backward()  # type: ignore[no-untyped-call]
        total += float((nll.detach() * weight[part]).sum())
    return total


class _Keep:
    """Prompts or text whose next-token distributions are to stay those of the unedited model.

    Of the unedited model only the hidden states before the head are kept (a few kilobytes a row), found when a row
    first comes up.
    """

    def __init__(self, lm: LM, rows: Sequence[Row]) -> None:
        self.lm, self.rows = lm, rows
        self.hidden: dict[int, Tensor] = {}

    def loss(
        self,
        change: Callable[[], AbstractContextManager[None]],
        chosen: Sequence[int],
        strength: float,
        hp: Refine,
    ) -> float:
        """Mean KL(unedited || edited) over the scored positions of the rows ``chosen``.

        Adds ``strength`` times its gradient to the left factors.

        Args:
            change: makes a context in which the model computes with the edit.
        """
        count = sum(len(self.rows[i].ids) - self.rows[i].prompt_length for i in chosen)
        total = 0.0
        for part in by_length([len(self.rows[i].ids) for i in chosen], hp.batch_tokens):
            members = [chosen[i] for i in part]
            padded = batch([self.rows[i] for i in members], self.lm.pad_id, self.lm.device)
            base = self._base(members, padded)
            with change():
                edited = target_logits(self.lm, padded)
            loss = losses.kl(base, edited).sum() / count
            if strength > 0:
                (strength * loss).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _base(self, members: Sequence[int], padded: Batch) -> Tensor:
        """Logits of the unedited model at the scored positions of ``padded``."""
        if any(i not in self.hidden for i in members):
            before_head: list[Tensor] = []
            with on_input(self.lm.head, lambda h: before_head.append(h[padded.targets])):
                target_logits(self.lm, padded)
            sizes = [len(self.rows[i].ids) - self.rows[i].prompt_length for i in members]
            self.hidden.update(zip(members, torch.split(before_head[0], sizes), strict=True))
        return logits_of(self.lm, torch.cat([self.hidden[i] for i in members]))
