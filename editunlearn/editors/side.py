"""Training side memories: shard after shard under its own mask, then merged, then given a threshold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.deltas.side import SideMemory
from editunlearn.editors.memory_flow import Fitted, Stage
from editunlearn.errors import NumericalError
from editunlearn.lm.batching import by_length, chunks, halving
from editunlearn.lm.head import Head
from editunlearn.lm.hooks import StopForward, on_output
from editunlearn.lm.resume import Upper, Whole, resumable
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Row, batch
from editunlearn.lm.weights import root_mean_square, shape
from editunlearn.numerics import losses
from editunlearn.numerics.side import activation, latest, middles
from editunlearn.numerics.side_training import margin, merged, near, threshold

if TYPE_CHECKING:
    from editunlearn.editors.wise import HParams


@dataclass(frozen=True)
class Seen:
    """What enters the map at the tokens that count of some rows' prompts; no memory changes it.

    Attributes:
        inputs: (tokens, d_in) in the model's own precision, row after row.
        owner: (tokens,) number of the row that each belongs to.
        count: rows.
        norm: mean norm of the map's outputs there.
        most: tokens of each row that count.
    """

    inputs: Tensor
    owner: Tensor
    count: int
    norm: float
    most: int | None

    def activation(self, update: Tensor, rows: Tensor | None = None) -> Tensor:
        """Of the prompts, or in their order of those marked in ``rows`` (rows,) bool; float32."""
        if rows is None:
            return activation(self.inputs.float(), update, self.owner, self.count, self.most)
        tokens = rows[self.owner]
        owner = (rows.cumsum(0) - 1)[self.owner[tokens]]
        return activation(self.inputs[tokens].float(), update, owner, int(rows.sum()), self.most)

    def near(self, update: Tensor, level: float) -> Tensor:
        """Which prompts may have an activation of ``level`` or more, (rows,) bool."""
        return near(self.inputs, update, self.owner, self.count, level, self.most)


class Trainer:
    """Loss and steps of one side memory at a time.

    Attributes:
        forget: of the facts' rows, fact after fact, as many to each as there are contexts.
        keep: of the prompts to keep, and of the passages, in parts that take turns; each kind counts as much, however
            few they are.
        unit: what the margins are measured in.
    """

    def __init__(self, stage: Stage[HParams]) -> None:
        self.stage, self.hp, self.lm = stage, stage.hp, stage.lm
        self.module = self.lm.layout.module(self.lm.model, stage.site.name)
        self.head = Head(self.lm)
        self.rows = [row for own in stage.rows for row in own]
        self.contexts = len(stage.rows[0])
        self.first = self.lm.layout.layer_of(stage.site.name)
        self.why = resumable(self.lm, self.rows[0], self.first, Upper)
        self.passes: dict[tuple[Row, ...], Upper | Whole] = {}  # of the group that is trained
        if self.why:
            stage.console.warn(f"side memories: all blocks are run at every step, because {self.why}")
        self.forget = self._see(self.rows)
        turns = max(1, round(1 / self.hp.side.share))
        self.keep = [
            [self._see(rows[k::turns]) for k in range(min(turns, len(rows)))]
            for rows in (stage.keep, stage.texts)
            if rows
        ]
        relative = self.hp.margin.scale == "relative"
        ruler = self.keep[0] if self.keep else [self.forget]
        tokens = [len(seen.inputs) for seen in ruler]
        mean = sum(seen.norm * count for seen, count in zip(ruler, tokens, strict=True)) / max(1, sum(tokens))
        self.unit = mean if relative else 1.0
        self.shape = shape(self.lm.model, stage.site.name)
        relative = self.hp.side.scale == "relative"
        self.scale = root_mean_square(self.lm.model, stage.site.name) if relative else 1.0

    @torch.no_grad()
    def _see(self, rows: Sequence[Row]) -> Seen:
        """Prompts alone, in batches; what is behind a prompt is neither run nor seen."""
        inputs: dict[int, Tensor] = {}
        norms: list[Tensor] = []

        def run(part: Sequence[int]) -> None:
            prompts = [Row(rows[i].ids[: rows[i].prompt_length], 0, rows[i].prompt_length) for i in part]
            padded = batch(prompts, self.lm.pad_id, self.lm.device)

            def see(entering: Tensor, output: Tensor) -> None:
                mask = padded.attention_mask.bool().to(output.device)
                read = latest(mask, self.hp.routing.window)
                x = entering.reshape(*mask.shape, -1)
                for k, i in enumerate(part):
                    inputs[i] = x[k][read[k]].to(self.lm.device)
                norms.append(output.reshape(*mask.shape, -1).float().norm(dim=-1)[mask].cpu())
                raise StopForward

            with on_output(self.module, see), suppress(StopForward):
                forward(self.lm.model, padded)

        lengths = [row.prompt_length for row in rows]
        halving(by_length(lengths), run, self.stage.console.warn)
        counts = torch.tensor([len(inputs[i]) for i in range(len(rows))])
        owner = torch.arange(len(rows)).repeat_interleave(counts).to(self.lm.device)
        together = torch.cat([inputs[i] for i in range(len(rows))])
        return Seen(together, owner, len(rows), float(torch.cat(norms).mean()), self.hp.routing.tokens)

    def of(self, facts: Sequence[int], step: int | None = None) -> list[int]:
        """Numbers of the rows of some facts, ascending: all of them, or those that a step is made with."""
        most = self.hp.side.contexts
        chosen = list(range(self.contexts))
        if step is not None and most is not None and most < self.contexts:
            others = self.contexts - 1  # their turns come around, so that what is below the memory is computed once
            chosen = sorted({0, *(1 + (step * (most - 1) + k) % others for k in range(most - 1))})
        return [fact * self.contexts + k for fact in sorted(facts) for k in chosen]

    def inside(self, update: Tensor, own: Sequence[int]) -> Tensor:
        """Activations of some of the facts' rows, in their order."""
        rows = torch.zeros(len(self.rows), dtype=torch.bool)
        rows[list(own)] = True
        return self.forget.activation(update, rows.to(self.lm.device))

    def marks(self) -> Tensor:
        """Mean inputs of the facts' bare prompts, (facts, d_in) float32."""
        return middles(self.forget.inputs.float(), self.forget.owner, self.forget.count)[:: self.contexts]

    def outside(self, update: Tensor) -> Tensor:
        """Activations of all that is to be kept."""
        parts = [seen.activation(update) for kind in self.keep for seen in kind]
        return torch.cat([torch.zeros(0, device=self.lm.device), *parts])

    def loss(self, update: Tensor, own: Sequence[int], step: int = 0, *, grad: bool = False) -> float:
        """Loss of some rows (WISE): that of :meth:`targets` and that of :meth:`margins`; arguments as for these."""
        return self.targets(update, own, grad=grad) + self.margins(update, own, step, grad=grad)

    def margins(self, update: Tensor, own: Sequence[int], step: int = 0, *, grad: bool = False) -> float:
        """Loss of what the memory does to some rows, against what it does to prompts and passages to keep.

        Args:
            update: (d_out, d_in) float32; with ``grad`` the gradient is added to its own.
            own: numbers of the rows.
            step: which prompts and passages to keep it is that have their turn.

        Raises:
            NumericalError: it is not finite.
        """
        m = self.hp.margin
        bounds = (self.unit * m.outside, self.unit * m.inside, self.unit * m.gap)
        with torch.set_grad_enabled(grad):
            inside = self.inside(update, own)
            wrong = min(bounds[0], float(inside.detach().min()) - bounds[2])  # less active ones are as they should be
            seen = [kind[step % len(kind)] for kind in self.keep]
            outside = [one.activation(update, one.near(update, wrong)) for one in seen] or [inside[:0]]
            total = m.weight / self.unit * torch.stack([margin(inside, some, *bounds) for some in outside]).mean()
            if grad:
                total.backward()  # type: ignore[no-untyped-call]
        return _finite(float(total.detach()))

    def targets(self, update: Tensor, own: Sequence[int], *, grad: bool = False) -> float:
        """NLL of the targets, mean over tokens and then some rows; arguments and errors as for :meth:`margins`."""
        found = 0.0
        with torch.set_grad_enabled(grad):
            for part in by_length([len(self.rows[i].ids) for i in own], self.hp.tokens_at_once):
                nll = self._nll(update, tuple(self.rows[own[i]] for i in part)) * (len(part) / len(own))
                if grad:
                    nll.backward()  # type: ignore[no-untyped-call]
                found += float(nll.detach())
        return _finite(found)

    def _nll(self, update: Tensor, rows: tuple[Row, ...]) -> Tensor:
        if rows not in self.passes:  # what is below the memory's block is the same at every step
            resume = not self.why and self.first > 0
            self.passes[rows] = Upper.of(self.lm, rows, self.first) if resume else Whole(self.lm, rows)
        padded = self.passes[rows].padded
        with on_output(self.module, _adding(update)):
            states = self.passes[rows].hidden(padded.targets)
        token = self.head.cross_entropy(states, padded.labels)
        return losses.mean_by(token, padded.owners, len(rows)).mean()

    def train(self, shard: Sequence[int], number: int, progress: Callable[[int], None]) -> Tensor:
        """The update for a shard of the facts, (d_out, d_in) float32 on the model's device."""
        hp, draw = self.hp.side, torch.Generator().manual_seed(self.hp.seed + number)
        mask = (torch.rand(self.shape, generator=draw) < hp.mask).to(self.lm.device)
        update = torch.zeros(self.shape, device=self.lm.device, requires_grad=True)
        for group in chunks(shard, hp.batch):
            self.passes.clear()
            self._fit(update, mask, group, hp.steps)
            progress(len(group))
        return update.detach()

    def repair(self, merged: Tensor, facts: Sequence[int]) -> Tensor:
        """A merged update, its entries trained on all of its facts."""
        update = merged.clone().requires_grad_(True)
        self.passes.clear()
        self._fit(update, merged != 0, facts, self.hp.shards.repair)
        return update.detach()

    def _fit(self, update: Tensor, mask: Tensor, group: Sequence[int], steps: int) -> None:
        """Steps on one group of facts, in place."""
        hp, rate = self.hp.side, self.hp.side.lr * self.scale
        kind = torch.optim.Adam if hp.scale == "relative" else torch.optim.SGD
        optimizer: torch.optim.Optimizer = kind([update], lr=rate)
        looks, said = 0, math.inf
        for step in range(steps):
            optimizer.zero_grad()
            apart = self.margins(update, self.of(group, step), step, grad=True)
            if said > hp.learned or step % hp.rest == 0:
                said, looks = self.targets(update, self.of(group, looks), grad=True), looks + 1
            if apart + said <= hp.stop_loss:
                break
            with torch.no_grad():
                assert update.grad is not None  # noqa: S101 - the loss has just made it
                update.grad.mul_(mask)
                update.mul_(1 - hp.lr * hp.weight_decay)
            optimizer.step()
            if hp.clamp is not None:
                with torch.no_grad():
                    update.clamp_(-hp.clamp * self.scale, hp.clamp * self.scale)


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NumericalError("the loss of a side memory is not finite; try a smaller side.lr or float32.")
    return loss


def _adding(update: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def change(inputs: Tensor, output: Tensor) -> Tensor:
        return (output.float() + inputs.float() @ update.to(inputs.device).T).to(output.dtype)

    return change


def fit(stage: Stage[HParams]) -> Fitted:
    """All shards, merged memory by memory; each memory's threshold is measured on what came out of the merging."""
    trainer, hp = Trainer(stage), stage.hp.shards
    shards = list(chunks(range(len(stage.facts)), hp.size))
    with stage.console.progress(len(stage.facts), "side memories (facts)") as bar:
        updates = [_trained(trainer, shard, number, bar.update) for number, shard in enumerate(shards)]
    groups = list(chunks(range(len(shards)), hp.per_memory or len(shards)))
    served = [[fact for i in group for fact in shards[i]] for group in groups]
    memories = []
    for group, facts in zip(groups, served, strict=True):
        update = merged([updates[i] for i in group], hp.merge, hp.density)
        memories.append(trainer.repair(update, facts) if len(group) > 1 else update)
    levels = [_threshold(trainer, update, facts) for update, facts in zip(memories, served, strict=True)]
    stage.console.info(
        f"side memories: {len(memories)} of {len(shards)} shards, "
        f"{sum(m.nbytes for m in memories) / 1e6:,.1f} MB beside {stage.site.name}"
    )
    entries = [tuple(stage.facts[fact].id for fact in facts) for facts in served]
    order = [(fact, number) for number, facts in enumerate(served) for fact in facts]
    marks = trainer.marks()[[fact for fact, _ in order]].cpu()
    owners = torch.tensor([float(number) for _, number in order])
    archive = torch.stack(memories).cpu(), torch.tensor(levels), marks, owners
    routing = stage.hp.routing
    return Fitted(SideMemory(*archive, window=routing.window, most=routing.tokens), entries)


def _trained(trainer: Trainer, shard: Sequence[int], number: int, progress: Callable[[int], None]) -> Tensor:
    """A shard's update, from the interrupted run if that finished it."""
    work = trainer.stage.work
    name = "side-" + hashlib.sha256(repr((number, list(shard))).encode()).hexdigest()[:16]
    kept = work.get(name)
    if kept is not None:
        progress(len(shard))
        return kept["update"].to(trainer.lm.device)
    update = trainer.train(shard, number, progress)
    work.put(name, {"update": update})
    return update


@torch.no_grad()
def _threshold(trainer: Trainer, update: Tensor, facts: Sequence[int]) -> float:
    inside, outside = trainer.inside(update, trainer.of(facts)), trainer.outside(update)
    routing, warn = trainer.hp.routing, trainer.stage.console.warn
    found = threshold(inside, outside, routing.ratio, routing.clear)
    asleep, woken = int((inside < found).sum()), int((outside >= found).sum())
    if asleep or woken:
        warn(
            f"a side memory of {len(facts)} facts is missed by {asleep} of their {len(inside)} prompts and woken by "
            f"{woken} of {len(outside)} prompts to keep; try more side.steps or a larger margin.weight"
        )
    return found
