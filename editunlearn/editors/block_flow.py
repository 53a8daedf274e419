"""The flow of methods that train one block: values of its output, then the block itself (UnKE, arXiv 2405.15349).

The block alone is run, on what entered it: nothing below changes, and nothing above is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editunlearn.deltas.changes import Changes, optimiser_state, restore
from editunlearn.editors import chunks, contexts, finding, keeping, located, memory_flow
from editunlearn.errors import NumericalError
from editunlearn.lm.attention import short_rows
from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.hooks import StopForward, first_tensor, frozen
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Row, batch
from editunlearn.lm.weights import linear_maps
from editunlearn.numerics.block import mismatch

if TYPE_CHECKING:
    from types import ModuleType

    from editunlearn.console import Console
    from editunlearn.deltas.lowrank import Dense
    from editunlearn.editors.earlier import Earlier
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.hparams import BlockHParams
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace

STATE = "block"
"""Name of the unfinished training in a workspace."""
SAVE_EVERY = 10
"""Updates from one saving to the next."""


@dataclass(frozen=True)
class Lesson:
    """A row at which the block is to give certain outputs.

    Attributes:
        row: the tokens; what stands behind the last of them does not matter.
        at: tokens where the output is to change; nowhere, if it is kept.
        change: (len(at), width) by how much, float32.
        elsewhere: weight of each other token, those of ``at`` counting 1.
    """

    row: Row
    at: tuple[int, ...] = ()
    change: Tensor | None = None
    elsewhere: float = 1.0


@dataclass(frozen=True)
class Piece:
    """What entered the block for some rows, and what it is to make of it.

    Attributes:
        args, kwargs: of the block's call.
        mask: (rows, length) bool, tokens that are no padding.
        wanted: (tokens, width) float32, in the order of ``mask``.
        weight: (tokens,) of each in the loss.
        moved: (tokens,) bool, where ``wanted`` is not what the block gave.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor
    wanted: Tensor
    weight: Tensor
    moved: Tensor

    def outputs(self, block: nn.Module) -> Tensor:
        """What the block gives now, (tokens, width) float32; blocks return states alone, or first of several things."""
        states = first_tensor(block(*self.args, **self.kwargs))
        return states.reshape(*self.mask.shape, -1)[self.mask.to(states.device)].float()


def run(
    lm: LM,
    request: ForgetRequest,
    hp: BlockHParams,
    method: ModuleType,
    work: Workspace,
    cache: Path | None,
    console: Console,
    earlier: Earlier | None,
) -> dict[str, Dense]:
    """The change of each linear map of the block.

    Raises:
        InputError: a layer that the model does not have, no facts, facts without target.
        UnsupportedError: the block's weights are quantised.
        NumericalError: a loss that is not finite.
    """
    name = lm.layout.block_name(located.blocks(lm, request, hp, method, console)[0])
    held = earlier.active(lm) if earlier is not None else nullcontext()
    with frozen(lm.model), short_rows(lm.device), held:
        facts, kept = _lessons(lm, request, hp, name, work, cache, console)
        trainer = Trainer(lm, hp, name, facts, kept, work, console)
        return trainer.train()


def _lessons(
    lm: LM, request: ForgetRequest, hp: BlockHParams, name: str, work: Workspace, cache: Path | None, console: Console
) -> tuple[list[Lesson], list[Lesson]]:
    """Rows of the facts, with what is to change there, and rows to keep."""
    texts = contexts.prefixes(lm, hp.context_prefixes, cache)
    rows = contexts.forget_rows(lm, request.facts, texts, hp)
    pieces, parts = chunks.split(rows, hp.chunks)
    keep = keeping.facts(request, hp.keep)
    values = finding.find(
        lm,
        lambda: contexts.problems(lm, request.facts, pieces, keep, hp, parts.owner),
        parts,
        [name],
        hp,
        work,
        console,
        unit="chunks" if hp.chunks is not None else "facts",
    )
    finding.warn_if_hard(values, [request.facts[number] for number in parts.owner], console)
    facts = []
    for number in range(len(request.facts)):
        own = [part for part, owner in enumerate(parts.owner) if owner == number]
        change = values.change[own, 0]
        for of_context in zip(*(pieces.targets[part] for part in own), strict=True):
            whole = contexts.prompt_alone(of_context[0]) if hp.chunks is None else of_context[-1]
            elsewhere = 1.0 if hp.chunks is None else hp.chunks.preserve
            facts.append(Lesson(whole, tuple(row.lookup for row in of_context), change, elsewhere))
    kept = [*memory_flow.prompts_to_keep(lm, request, hp), *memory_flow.texts_to_keep(lm, hp)]
    return facts, [Lesson(row) for row in kept]


class Trainer:
    """One block and what it is trained on."""

    def __init__(
        self,
        lm: LM,
        hp: BlockHParams,
        name: str,
        facts: Sequence[Lesson],
        kept: Sequence[Lesson],
        work: Workspace,
        console: Console,
    ) -> None:
        self.lm, self.hp, self.work, self.console = lm, hp, work, console
        self.block = lm.layout.module(lm.model, name)
        self.facts, self.kept = self._pieces(facts), self._pieces(kept) if hp.train.kept > 0 else []
        moves = torch.cat([lesson.change for lesson in facts if lesson.change is not None])
        self.unit = float(moves.square().mean().clamp(min=1e-30))
        self.changes = Changes(lm, linear_maps(lm.model, name))

    @torch.no_grad()
    def _pieces(self, lessons: Sequence[Lesson]) -> list[Piece]:
        made: list[Piece] = []

        def run(part: Sequence[int]) -> None:
            made.append(self._piece([lessons[i] for i in part]))

        halving(by_length([len(x.row.ids) for x in lessons], self.hp.tokens_at_once), run, self.console.warn)
        return made

    def _piece(self, lessons: Sequence[Lesson]) -> Piece:
        padded = batch([lesson.row for lesson in lessons], self.lm.pad_id, self.lm.device)
        mask = padded.attention_mask.bool()
        seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

        def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append((args, kwargs, first_tensor(output)))
            raise StopForward

        handle = self.block.register_forward_hook(see, with_kwargs=True)
        try:
            with suppress(StopForward):
                forward(self.lm.model, padded)
        finally:
            handle.remove()
        args, kwargs, output = seen[0]
        wanted = output.reshape(*mask.shape, -1).float().clone()
        weight, moved = mask.float().to(wanted.device), torch.zeros_like(mask, device=wanted.device)
        for number, lesson in enumerate(lessons):
            weight[number] *= lesson.elsewhere
            if lesson.change is not None:
                at = list(lesson.at)
                wanted[number, at] += lesson.change.to(wanted)
                weight[number, at], moved[number, at] = 1.0, True
        mask = mask.to(wanted.device)
        return Piece(args, kwargs, mask, wanted[mask], weight[mask], moved[mask])

    def loss(self) -> float:
        """Mean squared difference over the facts' tokens, plus ``train.kept`` times that over those to keep, in units
        of the mean squared change of the values; the gradient is added to the changes' own."""
        total = 0.0
        for pieces, share in ((self.facts, 1.0), (self.kept, self.hp.train.kept)):
            tokens = sum(float(piece.weight.sum()) for piece in pieces)
            for piece in pieces:
                with self.changes.active(), torch.enable_grad():
                    apart = mismatch(piece.outputs(self.block), piece.wanted, piece.weight)
                    one = share * apart / (tokens * self.unit)
                self.changes.add(torch.autograd.grad(one, self.changes.leaves, allow_unused=True))
                total += float(one.detach())
        return total

    def train(self) -> dict[str, Dense]:
        """AdamW on the change, from where an interrupted run was.

        Raises:
            NumericalError: the loss is not finite.
        """
        hp, values = self.hp.train, self.changes.values
        units = self.changes.units if hp.scale == "relative" else dict.fromkeys(values, 1.0)
        groups = [{"params": [value], "lr": hp.lr * units[name]} for name, value in values.items()]
        adam = torch.optim.AdamW(groups, weight_decay=hp.weight_decay)
        done = self._resume(adam)
        with self.console.progress(hp.steps, "block (steps)") as bar:
            bar.update(done)
            for step in range(done, hp.steps):
                adam.zero_grad(set_to_none=True)
                loss = self.loss()
                if not torch.isfinite(torch.tensor(loss)):
                    raise NumericalError(
                        f"the loss of the block is {loss} at step {step + 1}; try a smaller train.lr or float32."
                    )
                adam.step()
                self.changes.refresh()
                bar.update(1)
                self.console.detail(f"block {step + 1}: loss {loss:.4g}", level=2)
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == hp.steps:
                    self.work.put(STATE, {**optimiser_state(adam, values), "done": torch.tensor(step + 1)})
        self._tell()
        return self.changes.updates()

    def _resume(self, adam: torch.optim.Optimizer) -> int:
        state = self.work.get(STATE)
        if state is None:
            return 0
        restore(adam, self.changes.values, state)
        self.changes.refresh()
        self.console.info(f"block: going on after {int(state['done'])} steps")
        return int(state["done"])

    @torch.no_grad()
    def _tell(self) -> None:
        """How much of what was wanted the block gives."""
        missing, count = 0.0, 0
        for piece in self.facts:
            with self.changes.active():
                apart = (piece.outputs(self.block) - piece.wanted)[piece.moved]
            missing, count = missing + float(apart.square().mean(-1).sum()), count + len(apart)
        share = missing / (count * self.unit)
        self.console.info(f"block: {100 * max(0.0, 1 - share):.0f}% of the values are given")
        if share > 0.5:
            self.console.warn("the block gives less than half of the values; try more train.steps or a larger lr")
