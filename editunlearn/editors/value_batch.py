"""Values of one batch of facts, from the clean pass to the last step.

Facts go through the blocks in small passes and through the output head together: what a pass makes stays in a
processor's cache, and the head's weights are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from editunlearn.editors.value_types import Problem, Replacing, Values
from editunlearn.errors import NumericalError
from editunlearn.lm.batching import by_length
from editunlearn.lm.head import Head
from editunlearn.lm.hooks import StopForward, on_output, stack
from editunlearn.lm.placed import placed
from editunlearn.lm.resume import Pass, Tail, Upper, Whole
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Batch, batch, until_lookup
from editunlearn.numerics import losses
from editunlearn.numerics.codebook import replaced

if TYPE_CHECKING:
    from editunlearn.hparams.pieces import OneValue
    from editunlearn.lm.loading import LM

Way = type[Tail] | type[Upper]

CACHED = 512
"""Padded tokens that go through the blocks together on a CPU."""


def tokens_of(problem: Problem, *, skip: bool) -> int:
    """Padded tokens of a problem at each step, those before the lookup tokens left out if they are not run again."""
    rows = problem.rows + problem.pinned
    return len(rows) * max(len(row.ids) - (row.lookup if skip else 0) for row in rows)


@dataclass
class _Piece:
    """Rows that go through the blocks together.

    Attributes:
        rows: their numbers.
        whole: the pass over all of them.
        picked: some of them and the pass over those, from the step before.
    """

    rows: list[int]
    whole: Pass
    picked: tuple[list[int], Pass]

    def has(self, facts: set[int], owner: Sequence[int]) -> bool:
        """Whether a row is of one of ``facts``."""
        return any(owner[row] in facts for row in self.rows)

    def of(self, rows: list[int]) -> tuple[list[int], Pass]:
        """Some of the rows."""
        if self.picked[0] != rows:
            place = {row: k for k, row in enumerate(self.rows)}
            self.picked = rows, self.whole.pick([place[row] for row in rows])
        return self.picked


class _Scored(NamedTuple):
    """States before the head of one pass, and what they are for.

    Attributes:
        targets: (t, width) states that are to predict ``labels``.
        pinned: (p, width) states whose prediction is to stay that of ``base``.
        owner: (t,) the fact of each target token, by its place among the active ones.
        share: (t,) what each target token counts for in its fact's mean.
        of_pinned: (p,) the fact of each pinned state.
    """

    targets: Tensor
    pinned: Tensor
    labels: Tensor
    base: Tensor
    owner: Tensor
    share: Tensor
    of_pinned: Tensor


class Together:
    """One batch of facts, from the clean pass to the last step."""

    def __init__(
        self,
        lm: LM,
        head: Head,
        problems: Sequence[Problem],
        modules: Sequence[str],
        hparams: OneValue,
        start: tuple[Way, int] | None,
        replacing: Replacing | None,
    ) -> None:
        self.lm, self.head, self.problems, self.hparams, self.start = lm, head, problems, hparams, start
        self.replacing = replacing
        self.modules = [lm.layout.module(lm.model, name) for name in modules]
        pinned = [p.pinned if hparams.kl > 0 else () for p in problems]
        self.rows = [r for p, more in zip(problems, pinned, strict=True) for r in (*p.rows, *more)]
        self.fact = [i for i, p in enumerate(problems) for _ in (*p.rows, *pinned[i])]
        self.is_pinned = [k >= len(p.rows) for i, p in enumerate(problems) for k in range(len(p.rows) + len(pinned[i]))]
        self.clean = self._clean_outputs()
        self.norm = self.clean.norm(dim=-1, keepdim=True)
        unit = self.norm / self.clean.shape[-1] ** 0.5
        self.unit = unit if hparams.scale == "relative" else torch.ones_like(unit)
        self.pieces = [self._piece(part) for part in self._divided()]
        self.base = self._pinned_base()

    @torch.no_grad()
    def _clean_outputs(self) -> Tensor:
        """(n, m, d_out) outputs of the modules at the lookup token of the bare prompts."""
        padded = batch([until_lookup(p.rows[0]) for p in self.problems], self.lm.pad_id, self.lm.device)
        seen: list[Tensor] = []

        def see(_inputs: Tensor, output: Tensor) -> None:
            seen.append(padded.at_lookup(output).float().to(self.lm.device))
            if len(seen) == len(self.modules):
                raise StopForward

        bare = [self.fact.index(number) for number in range(len(self.problems))]
        # what stands comes first, or it would not be seen
        with self._standing(bare), stack([on_output(m, see) for m in self.modules]), suppress(StopForward):
            forward(self.lm.model, padded)
        return torch.stack(seen, dim=1)

    def solve(self, names: Sequence[int]) -> Values:
        """Adam until every fact has converged or used up its steps; ``names`` are the facts' numbers for messages."""
        hp = self.hparams
        step = torch.zeros_like(self.clean)
        if self.replacing is not None and self.replacing.start is not None:
            step = (self.replacing.start.to(self.clean) - self.clean) / self.unit
        state = [torch.zeros_like(step), torch.zeros_like(step)]
        loss = torch.full((len(self.problems),), torch.nan)
        steps = torch.zeros(len(self.problems), dtype=torch.long)
        active = list(range(len(self.problems)))
        for iteration in range(hp.steps + 1):
            now = step[active].clone().requires_grad_(iteration < hp.steps)
            nll, total = self._loss(active, now)
            if not torch.isfinite(total).all():
                bad = active[int((~torch.isfinite(total)).nonzero()[0])]
                name = self.problems[bad].name or f"fact number {names[bad] + 1}"
                raise NumericalError(
                    f"the value of {name} has a loss that is not finite; try a smaller value.lr or float32"
                )
            loss[active] = nll.detach().cpu()
            reached = total if hp.penalty == "norm" else nll  # as published, the penalties count
            keep = [i for i in range(len(active)) if reached[i] >= hp.stop_loss]
            if iteration == hp.steps or not keep:
                break
            (grad,) = torch.autograd.grad(total.sum(), now)
            moved = [active[i] for i in keep]
            step[moved] = self._adam(step[moved], grad[keep], [s[moved] for s in state], iteration, state, moved)
            steps[moved] += 1
            active = moved
        return Values((step * self.unit).cpu(), self.clean.cpu(), loss, steps)

    def _adam(
        self, value: Tensor, grad: Tensor, old: list[Tensor], t: int, state: list[Tensor], rows: list[int]
    ) -> Tensor:
        """One Adam step of the facts still active, then the norm limit."""
        first = 0.9 * old[0] + 0.1 * grad
        second = 0.999 * old[1] + 0.001 * grad**2
        state[0][rows], state[1][rows] = first, second
        value = value - self.hparams.lr * (first / (1 - 0.9 ** (t + 1))) / (
            (second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8
        )
        if self.hparams.clamp is None:
            return value
        limit = self.hparams.clamp * self.norm[rows] / self.unit[rows]
        shrink: Tensor = (limit / value.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        return value * shrink

    def _divided(self) -> list[list[int]]:
        """Facts that go through the blocks together, by the number of their first row."""
        if self.lm.device.type != "cpu":
            return [list(range(len(self.problems)))]
        sizes = [tokens_of(problem, skip=self.start is not None) for problem in self.problems]
        return by_length(sizes, CACHED)

    def _piece(self, facts: Sequence[int]) -> _Piece:
        chosen = set(facts)
        numbers = [row for row, fact in enumerate(self.fact) if fact in chosen]
        whole = self._pass(numbers)
        return _Piece(numbers, whole, (numbers, whole))

    def _pass(self, numbers: Sequence[int]) -> Pass:
        rows = [self.rows[i] for i in numbers]
        if self.start is not None:
            way, first = self.start
            with suppress(ValueError), self._standing(numbers) as standing:  # rows may be too long for it
                # what stands in one row must not get into another
                return (
                    Tail.of(self.lm, rows, first, share=not standing) if way is Tail else way.of(self.lm, rows, first)
                )
        return Whole(self.lm, rows)

    @contextmanager
    def _standing(self, rows: Sequence[int]) -> Iterator[bool]:
        """The changes of the facts' other tokens are at work in a pass over rows of these numbers; whether any are."""
        at: list[int] = []
        tokens: list[int] = []
        changes: list[Tensor] = []
        for place, row in enumerate(rows):
            problem = self.problems[self.fact[row]]
            if problem.standing is not None and not self.is_pinned[row]:
                own = problem.standing.tokens[row - self.fact.index(self.fact[row])]
                at += [place] * len(own)
                tokens += own
                changes.append(problem.standing.change)
        if not changes:
            yield False
            return
        with placed(self.lm.model, self.modules, torch.tensor(at), torch.tensor(tokens), torch.cat(changes)):
            yield True

    def _hidden(self, rows: Pass, scored: Tensor, add: Tensor | None) -> Tensor:
        """States before the head at ``scored`` with ``add`` (rows, m, d_out) added at the lookup token of each row.

        Where outputs are replaced, ``add`` is what they are replaced by.
        """
        padded, replacing = rows.padded, self.replacing

        def inject(index: int) -> Callable[[Tensor, Tensor], Tensor]:
            def change(_inputs: Tensor, output: Tensor) -> Tensor:
                assert add is not None  # noqa: S101 - inject is only installed when there is something to add
                flat = output.reshape(*padded.input_ids.shape, -1).clone()
                if replacing is not None:
                    mask, new = padded.attention_mask.bool().to(flat.device), add[:, index].to(flat)
                    where = replaced(mask, padded.lookup, replacing.where)
                    return torch.where(where[..., None], new[:, None], flat).reshape(output.shape)
                changed = padded.at_lookup(flat).float() + add[:, index].to(flat.device)
                rows = torch.arange(len(flat), device=flat.device)
                flat[rows, padded.lookup.to(flat.device)] = changed.to(flat.dtype)
                return flat.reshape(output.shape)

            return change

        hooks = [on_output(m, inject(i)) for i, m in enumerate(self.modules)] if add is not None else []
        with stack(hooks):
            return rows.hidden(scored)

    def _pinned_positions(self, padded: Batch, pinned: Tensor) -> Tensor:
        """Where the rows marked in ``pinned`` keep their next-token distribution, (batch, length) bool."""
        where = padded.last if self.hparams.kl_on == "prompts" else padded.lookup
        scored = torch.zeros_like(padded.input_ids, dtype=torch.bool)
        scored[torch.arange(len(where), device=where.device), where] = pinned
        return scored

    @torch.no_grad()
    def _pinned_base(self) -> Tensor:
        """By row, the unedited state before the head at the pinned position; rows that are not pinned have none."""
        base = torch.empty(0)
        for piece in self.pieces:
            places = [place for place, row in enumerate(piece.rows) if self.is_pinned[row]]
            if not places:
                continue
            rows = piece.whole.pick(places)
            every = torch.ones(len(places), dtype=torch.bool, device=self.lm.device)
            states = self._hidden(rows, self._pinned_positions(rows.padded, every), None)
            if not len(base):
                base = torch.zeros(len(self.rows), states.shape[1], dtype=states.dtype, device=states.device)
            base[[piece.rows[place] for place in places]] = states
        return base

    def _scored(self, piece: _Piece, active: set[int], given: Tensor, place: Tensor) -> _Scored:
        """What one pass says of the active facts, ``given`` (active, m, d_out) being what their outputs get."""
        chosen, rows = piece.of([row for row in piece.rows if self.fact[row] in active])
        device, padded = self.lm.device, rows.padded
        numbers = torch.tensor(chosen, device=device)
        fact = place[torch.tensor([self.fact[i] for i in chosen], device=device)]
        pinned = torch.tensor([self.is_pinned[i] for i in chosen], device=device)
        at_targets, at_pinned = padded.targets, self._pinned_positions(padded, pinned)
        with self._standing(chosen):
            states = self._hidden(rows, at_targets | at_pinned, given[fact])
        is_target = at_targets[at_targets | at_pinned]
        base = self.base[numbers[pinned].to(self.base.device)] if len(self.base) else states[:0]
        owner = fact[padded.owners]
        # a row's mean over its tokens, then a fact's mean over its rows
        tokens = torch.bincount(padded.owners, minlength=len(chosen))[padded.owners]
        rows_of_fact = torch.bincount(fact[~pinned], minlength=len(given))[owner]
        share = 1 / (tokens * rows_of_fact)
        return _Scored(states[is_target], states[~is_target], padded.labels, base, owner, share, fact[pinned])

    def _loss(self, active: Sequence[int], step: Tensor) -> tuple[Tensor, Tensor]:
        """Target NLL and whole loss of each active fact, (active,) float32 each."""
        add = step * self.unit[active]
        given = add if self.replacing is None else self.clean[active] + add
        place = torch.full((len(self.problems),), -1, device=self.lm.device)
        place[list(active)] = torch.arange(len(active), device=self.lm.device)
        wanted = set(active)
        parts = [self._scored(piece, wanted, given, place) for piece in self.pieces if piece.has(wanted, self.fact)]
        targets, pinned, labels, base, owner, share, of_pinned = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        # the head reads its weights once for all passes
        loss = self.head.losses(torch.cat([targets, pinned]), labels, base)
        token, kl = loss[: len(labels)], loss[len(labels) :]
        nll = torch.zeros(len(active), device=loss.device).index_add(0, owner, token * share)
        relative = (add.norm(dim=-1) / self.norm[active, :, 0]).square().mean(-1)
        if self.hparams.penalty == "norm":
            relative = (add.norm(dim=-1) / self.norm[active, :, 0].square()).mean(-1)
        total = nll + self.hparams.weight_decay * relative
        return nll, total + self.hparams.kl * losses.mean_by(kl, of_pinned, len(active))
