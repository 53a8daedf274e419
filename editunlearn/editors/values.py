"""Values: for every fact, the change of a projection's output at the lookup token that makes the model say the target.

Many facts are optimised in one masked forward pass. Each has its own change, its own norm limit and its own stop;
nothing is shared between facts, so that a fact alone gives what it gives in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.editors.value_types import Problem, Replacing, Store, Values
from editunlearn.errors import NumericalError
from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.head import Head
from editunlearn.lm.hooks import StopForward, on_output, stack
from editunlearn.lm.placed import placed
from editunlearn.lm.resume import Pass, Tail, Upper, Whole, resumable
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Batch, Row, batch, until_lookup
from editunlearn.numerics import losses
from editunlearn.numerics.codebook import replaced

if TYPE_CHECKING:
    from editunlearn.hparams.pieces import OneValue
    from editunlearn.lm.loading import LM


Way = type[Tail] | type[Upper]


def optimise(
    lm: LM,
    problems: Sequence[Problem],
    modules: Sequence[str],
    hparams: OneValue,
    *,
    replacing: Replacing | None = None,
    tokens: int = 2048,
    store: Store | None = None,
    progress: Callable[[int], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Values:
    """Optimise the change of the outputs of ``modules`` for every problem, jointly over the modules.

    Loss of a fact (MEMIT, arXiv 2210.07229, eq. 16, with scale-free units): mean NLL of the target over contexts
    + ``kl`` * KL(unedited || edited) on its pinned prompts + ``weight_decay`` * relative norm of the change (squared,
    or as published not). With ``scale="relative"`` Adam steps in units of the root mean square of the clean output,
    else in absolute units. The relative norm is limited to ``clamp``.

    Processes (``lm.among``) share the batches, and each gets all values.

    Args:
        replacing: the outputs are replaced by clean output + change, at more tokens if it says so.
        tokens: padded tokens of one batch of facts.
        store: keeps finished batches, so that an interrupted run goes on after them.

    Raises:
        NumericalError: a loss that is not finite; names the problem's index.
    """
    store = store or Store(None)
    results: dict[int, Values] = {}  # of this process's share
    first = min(map(lm.layout.layer_of, modules))
    way: Way = Tail if replacing is None or replacing.where == "last" else Upper
    why = resumable(lm, _telling(problems), first, way) if problems else ""
    head = Head(lm)
    if why:
        warn(f"values: all tokens go through all blocks at every step, because {why}")

    def run(part: Sequence[int]) -> None:
        kept = store.get(part)
        if kept is None:
            own = replacing.of(part) if replacing is not None else None
            start = None if why else (way, first)
            kept = _Together(lm, head, [problems[i] for i in part], modules, hparams, start, own).solve(part)
            store.put(part, kept)
        for k, i in enumerate(part):
            results[i] = kept.at(k)
        progress(len(part))

    sizes = [max(len(r.ids) for r in p.rows + p.pinned) * (len(p.rows) + len(p.pinned)) for p in problems]
    batches = by_length(sizes, tokens)

    def share() -> dict[int, Values]:
        halving(lm.among.share(batches), run, warn)
        return results

    found = {i: values for part in lm.among.each(share) for i, values in part.items()}
    return Values.of([found[i] for i in range(len(problems))])


def _telling(problems: Sequence[Problem]) -> Row:
    """A row with a token before its subject, if there is one: the others have nothing that could be resumed."""
    return next((row for problem in problems for row in problem.rows if row.lookup), problems[0].rows[0])


class _Together:
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
        self.whole = self._pass(self.rows)
        self.picked: tuple[list[int], Pass] = list(range(len(self.rows))), self.whole
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

    def _pass(self, rows: Sequence[Row]) -> Pass:
        if self.start is not None:
            way, first = self.start
            with suppress(ValueError), self._standing(range(len(rows))):  # rows may be too long for it
                return way.of(self.lm, rows, first)
        return Whole(self.lm, rows)

    def _standing(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """The changes of the facts' other tokens are at work in a pass over rows of these numbers."""
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
            return nullcontext()
        return placed(self.lm.model, self.modules, torch.tensor(at), torch.tensor(tokens), torch.cat(changes))

    def _active(self, active: Sequence[int]) -> tuple[list[int], Pass]:
        """Numbers of the rows of some facts, and the pass over them."""
        wanted = set(active)
        chosen = [row for row, fact in enumerate(self.fact) if fact in wanted]
        if self.picked[0] != chosen:
            self.picked = chosen, self.whole.pick(chosen)
        return self.picked

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
        numbers = [i for i, pinned in enumerate(self.is_pinned) if pinned]
        if not numbers:
            return torch.empty(0)
        rows = self.whole.pick(numbers)
        every = torch.ones(len(numbers), dtype=torch.bool, device=self.lm.device)
        states = self._hidden(rows, self._pinned_positions(rows.padded, every), None)
        base = torch.zeros(len(self.rows), states.shape[1], dtype=states.dtype, device=states.device)
        base[numbers] = states
        return base

    def _loss(self, active: Sequence[int], step: Tensor) -> tuple[Tensor, Tensor]:
        """Target NLL and whole loss of each active fact, (active,) float32 each."""
        add = step * self.unit[active]
        chosen, rows = self._active(active)
        device = self.lm.device
        place = {fact: k for k, fact in enumerate(active)}
        fact = torch.tensor([place[self.fact[i]] for i in chosen], device=device)
        pinned = torch.tensor([self.is_pinned[i] for i in chosen], device=device)
        padded = rows.padded
        at_targets, at_pinned = padded.targets, self._pinned_positions(padded, pinned)
        given = add if self.replacing is None else self.clean[active] + add
        with self._standing(chosen):
            states = self._hidden(rows, at_targets | at_pinned, given[fact])
        is_target = at_targets[at_targets | at_pinned]
        base = self.base[chosen][pinned.to(self.base.device)] if len(self.base) else states[:0]
        loss = self.head.losses(torch.cat([states[is_target], states[~is_target]]), padded.labels, base)
        token, kl = loss[: len(padded.labels)], loss[len(padded.labels) :]
        # a row's mean over its tokens, then a fact's mean over its rows
        of_row = losses.mean_by(token, padded.owners, len(chosen))
        nll = losses.mean_by(of_row[~pinned], fact[~pinned], len(active))
        relative = (add.norm(dim=-1) / self.norm[active, :, 0]).square().mean(-1)
        if self.hparams.penalty == "norm":
            relative = (add.norm(dim=-1) / self.norm[active, :, 0].square()).mean(-1)
        total = nll + self.hparams.weight_decay * relative
        return nll, total + self.hparams.kl * losses.mean_by(kl, fact[pinned], len(active))
