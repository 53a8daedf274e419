"""Values: for every fact, the change of a projection's output at the lookup token that makes the model say the target.

Many facts are optimised in one masked forward pass. Each has its own change, its own norm limit and its own stop;
nothing is shared between facts, so that a fact alone gives what it gives in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from editunlearn.errors import NumericalError
from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.hooks import at_scored_positions, on_output, stack
from editunlearn.lm.resume import Pass, Tail, Whole, resumable
from editunlearn.lm.tokens import Batch, Row, batch
from editunlearn.numerics import losses

if TYPE_CHECKING:
    from editunlearn.hparams import Value
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace


@dataclass(frozen=True)
class Problem:
    """What one fact is optimised on.

    Attributes:
        rows: prompt with target, one row a context, the bare prompt first.
        pinned: prompts whose next-token distribution is to stay as it is (may be empty); read at the last token, or,
            as published, at the lookup token.
    """

    rows: tuple[Row, ...]
    pinned: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Values:
    """Result for ``n`` facts at ``m`` modules.

    Attributes:
        change: (n, m, d_out) float32, what to add to each module's output at the lookup token.
        clean: (n, m, d_out) float32, the unedited output there, bare prompt.
        loss: (n,) negative log-likelihood of the target, mean over its tokens and over contexts, at the last step.
        steps: (n,) updates made.
    """

    change: Tensor
    clean: Tensor
    loss: Tensor
    steps: Tensor

    NAMES: ClassVar[tuple[str, ...]] = ("change", "clean", "loss", "steps")

    def at(self, index: int) -> Values:
        """One fact's part, without the leading dimension."""
        return Values(*(getattr(self, name)[index] for name in self.NAMES))


class Store:
    """Finished batches of values in a workspace."""

    def __init__(self, work: Workspace | None) -> None:
        self.work = work
        self.names: list[str] = []

    def _name(self, part: Sequence[int]) -> str:
        return "values-" + hashlib.sha256(repr(list(part)).encode()).hexdigest()[:16]

    def get(self, part: Sequence[int]) -> Values | None:
        """The values of the problems ``part``, if an earlier run finished exactly that batch."""
        kept = self.work.get(self._name(part)) if self.work else None
        self.names.append(self._name(part))
        return Values(**kept) if kept else None

    def put(self, part: Sequence[int], found: Values) -> None:
        """Keep the values of a batch."""
        if self.work:
            self.work.put(self._name(part), vars(found))

    def clear(self) -> None:
        """Remove the batches; the caller has kept the whole."""
        for name in self.names if self.work else []:
            self.work.drop(name)  # type: ignore[union-attr]


def optimise(
    lm: LM,
    problems: Sequence[Problem],
    modules: Sequence[str],
    hparams: Value,
    *,
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

    Args:
        tokens: padded tokens of one batch of facts.
        store: keeps finished batches, so that an interrupted run goes on after them.

    Raises:
        NumericalError: a loss that is not finite; names the problem's index.
    """
    store = store or Store(None)
    results: dict[int, Values] = {}
    first = min(map(lm.layout.layer_of, modules))
    why = resumable(lm, problems[0].rows[0], first) if problems else ""
    if why:
        warn(f"values: all tokens go through all blocks at every step, because {why}")

    def run(part: Sequence[int]) -> None:
        found = store.get(part)
        if found is None:
            found = _Chunk(lm, [problems[i] for i in part], modules, hparams, None if why else first).solve(part)
            store.put(part, found)
        for k, i in enumerate(part):
            results[i] = found.at(k)
        progress(len(part))

    sizes = [max(len(r.ids) for r in p.rows + p.pinned) * (len(p.rows) + len(p.pinned)) for p in problems]
    halving(by_length(sizes, tokens), run, warn)
    return Values(*(torch.stack([getattr(results[i], name) for i in range(len(problems))]) for name in Values.NAMES))


class _Chunk:
    """One batch of facts, from the clean pass to the last step."""

    def __init__(
        self, lm: LM, problems: Sequence[Problem], modules: Sequence[str], hparams: Value, first: int | None
    ) -> None:
        self.lm, self.problems, self.hparams, self.first = lm, problems, hparams, first
        self.passes: dict[bool, Pass] = {}
        self.picked: dict[bool, tuple[list[int], Pass]] = {}
        self.modules = [lm.layout.module(lm.model, name) for name in modules]
        self.head = lm.head
        self.clean = self._clean_outputs()
        norm = self.clean.norm(dim=-1, keepdim=True)
        self.unit = norm / self.clean.shape[-1] ** 0.5 if hparams.scale == "relative" else torch.ones_like(norm)
        self.norm = norm

    def _clean_outputs(self) -> Tensor:
        """(n, m, d_out) outputs of the modules at the lookup token of the bare prompts."""
        padded = batch([p.rows[0] for p in self.problems], self.lm.pad_id, self.lm.device)
        seen: list[Tensor] = []

        def see(_inputs: Tensor, output: Tensor) -> None:
            seen.append(padded.at_lookup(output).float().to(self.lm.device))

        nothing = torch.zeros_like(padded.input_ids, dtype=torch.bool)
        nothing[0, 0] = True
        with (
            torch.no_grad(),
            stack([on_output(m, see) for m in self.modules]),
            at_scored_positions(self.head, nothing),
        ):
            self.lm.model(**padded.inputs, use_cache=False)
        return torch.stack(seen, dim=1)

    def solve(self, names: Sequence[int]) -> Values:
        """Adam until every fact has converged or used up its steps; ``names`` are the facts' numbers for messages."""
        hp = self.hparams
        step = torch.zeros_like(self.clean)
        state = [torch.zeros_like(step), torch.zeros_like(step)]
        loss = torch.full((len(self.problems),), torch.nan)
        steps = torch.zeros(len(self.problems), dtype=torch.long)
        active = list(range(len(self.problems)))
        base = self._pinned_base(active) if hp.kl > 0 else None
        for iteration in range(hp.steps + 1):
            now = step[active].clone().requires_grad_(iteration < hp.steps)
            nll, total = self._loss(active, now, base)
            if not torch.isfinite(total).all():
                bad = names[active[int((~torch.isfinite(total)).nonzero()[0])]]
                raise NumericalError(
                    f"the value of fact number {bad + 1} has a loss that is not finite; "
                    "try a smaller value.lr or float32"
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

    def _rows(self, active: Sequence[int], *, pinned: bool) -> tuple[Pass, Tensor]:
        """The rows of the active facts, and the number of each row's fact among them."""
        of_fact = [p.pinned if pinned else p.rows for p in self.problems]
        if pinned not in self.passes:
            self.passes[pinned] = self._pass([r for rows in of_fact for r in rows])
        starts = [sum(map(len, of_fact[:i])) for i in range(len(of_fact))]
        chosen = [starts[i] + k for i in active for k in range(len(of_fact[i]))]
        if self.picked.get(pinned, ([],))[0] != chosen:
            self.picked[pinned] = chosen, self.passes[pinned].pick(chosen)
        owners = [k for k, i in enumerate(active) for _ in of_fact[i]]
        return self.picked[pinned][1], torch.tensor(owners, device=self.lm.device)

    def _pass(self, rows: Sequence[Row]) -> Pass:
        if self.first is not None:
            with suppress(ValueError):  # these rows are too long for it
                return Tail.of(self.lm, rows, self.first)
        return Whole(self.lm, rows)

    def _logits(self, rows: Pass, scored: Tensor, add: Tensor | None) -> Tensor:
        """Logits (number scored, vocabulary) with ``add`` (rows, m, d_out) added at the lookup token of each row."""
        padded = rows.padded

        def inject(index: int) -> Callable[[Tensor, Tensor], Tensor]:
            def change(_inputs: Tensor, output: Tensor) -> Tensor:
                assert add is not None  # noqa: S101 - inject is only installed when there is something to add
                flat = output.reshape(*padded.input_ids.shape, -1).clone()
                changed = padded.at_lookup(flat).float() + add[:, index].to(flat.device)
                rows = torch.arange(len(flat), device=flat.device)
                flat[rows, padded.lookup.to(flat.device)] = changed.to(flat.dtype)
                return flat.reshape(output.shape)

            return change

        hooks = [on_output(m, inject(i)) for i, m in enumerate(self.modules)] if add is not None else []
        with stack(hooks):
            return rows.logits(scored)

    def _pinned_positions(self, padded: Batch) -> Tensor:
        where = padded.last if self.hparams.kl_on == "prompts" else padded.lookup
        scored = torch.zeros_like(padded.input_ids, dtype=torch.bool)
        scored[torch.arange(len(where), device=where.device), where] = True
        return scored

    def _pinned_base(self, active: Sequence[int]) -> Tensor | None:
        if not any(self.problems[i].pinned for i in active):
            return None
        rows, _ = self._rows(active, pinned=True)
        with torch.no_grad():
            return self._logits(rows, self._pinned_positions(rows.padded), None)

    def _loss(self, active: Sequence[int], step: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
        """Target NLL and whole loss of each active fact, (active,) float32 each."""
        add = step * self.unit[active]
        rows, fact = self._rows(active, pinned=False)
        padded = rows.padded
        logits = self._logits(rows, padded.targets, add[fact])
        token = losses.cross_entropy(logits, padded.labels)
        nll = losses.mean_by(losses.mean_by(token, padded.owners, len(fact)), fact, len(active))
        relative = (add.norm(dim=-1) / self.norm[active, :, 0]).square().mean(-1)
        if self.hparams.penalty == "norm":
            relative = (add.norm(dim=-1) / self.norm[active, :, 0].square()).mean(-1)
        total = nll + self.hparams.weight_decay * relative
        if base is not None and any(self.problems[i].pinned for i in active):
            pinned, owner = self._rows(active, pinned=True)
            counts = [len(self.problems[i].pinned) for i in range(len(self.problems))]
            chosen = torch.cat([torch.arange(sum(counts[:i]), sum(counts[: i + 1])) for i in active]).to(base.device)
            edited = self._logits(pinned, self._pinned_positions(pinned.padded), add[owner])
            total = total + self.hparams.kl * losses.mean_by(losses.kl(base[chosen], edited), owner, len(active))
        return nll, total
