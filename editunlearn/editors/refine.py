"""Refine: train the left factors of a closed-form edit, with the right (key) factors fixed.

The closed form writes values that were found one fact at a time; what they do together, and to everything else, is left to chance. Here a few tens of
Adam steps improve what is wanted (the target over all contexts) and what is to stay (the next-token distribution of the unedited model on prompts
that must stay and on generic text). The change stays low-rank and confined to the directions of the edited keys, which is what protects the rest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editunlearn.errors import NumericalError
from editunlearn.editors.values import kl, mean_by
from editunlearn.lm.batching import by_length
from editunlearn.lm.hooks import at_scored_positions, first_tensor, on_output, stack
from editunlearn.lm.tokens import Row, batch

if TYPE_CHECKING:
    from editunlearn.hparams import Refine
    from editunlearn.lm.loading import LM


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
    report: Callable[[int, float, float, float], None] = lambda *_: None,
) -> dict[str, Tensor]:
    """New left factors (d_out, r) for every module of ``factors`` (module -> (left, right)).

    Loss: NLL of the targets (a fact at or below ``hp.floor`` no longer counts) + ``hp.kl`` * mean KL on retain prompts + ``hp.text_kl`` * mean KL on text.
    Adam on all left factors, step ``hp.lr`` times the mean absolute left factor of the module, cosine decay.

    Args:
        report: called with (step, NLL, retain KL, text KL) after every step.

    Raises:
        NumericalError: a loss that is not finite.
    """
    left = {name: pair[0].to(lm.device).clone().requires_grad_(True) for name, pair in factors.items()}
    right = {name: pair[1].to(lm.device) for name, pair in factors.items()}
    sizes = {name: float(value.detach().abs().mean()) for name, value in left.items()}
    optimiser = torch.optim.Adam([{"params": [value], "lr": hp.lr * sizes[name]} for name, value in left.items()])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / hp.steps)))
    hooks = {name: low_rank_hook(left[name], right[name]) for name in left}
    draw = _Draw(goals, hp)
    for step in range(hp.steps):
        optimiser.zero_grad()
        with stack([on_output(lm.layout.module(lm.model, name), low_rank_hook(left[name], right[name])) for name in left]):
            nll = _forget(lm, draw.forget(), hp)
        kept = _keep(lm, left, right, draw.retain(), hp.kl, hp)
        text = _keep(lm, left, right, draw.text(), hp.text_kl, hp)
        if not all(map(math.isfinite, (nll, kept, text))):
            raise NumericalError(f"refine: the loss at step {step + 1} is not finite; try a smaller refine.lr")
        optimiser.step()
        schedule.step()
        report(step, nll, kept, text)
    return {name: value.detach().cpu() for name, value in left.items()}


class _Draw:
    """Seeded choice of what each step sees; every pool is gone through in a shuffled order before anything comes twice."""

    def __init__(self, goals: Goals, hp: Refine) -> None:
        self.goals, self.hp = goals, hp
        self.random = random.Random(hp.seed)  # noqa: S311 - sampling, not cryptography
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

    def retain(self) -> list[Row]:
        return [self.goals.retain[i] for i in self._next("retain", len(self.goals.retain), self.hp.retain_batch)]

    def text(self) -> list[Row]:
        return [self.goals.text[i] for i in self._next("text", len(self.goals.text), self.hp.text_batch)]


def _forget(lm: LM, facts: Sequence[Sequence[Row]], hp: Refine) -> float:
    """Mean NLL of the targets; its gradient is added to the left factors, batch by batch."""
    rows = [(row, i) for i, fact in enumerate(facts) for row in fact]
    weight = torch.tensor([1 / (len(facts[i]) * len(facts)) for _, i in rows], device=lm.device)
    total = 0.0
    for part in by_length([len(r.ids) for r, _ in rows], hp.batch_tokens):
        padded = batch([rows[i][0] for i in part], lm.pad_id, lm.device)
        with at_scored_positions(lm.model.get_output_embeddings(), padded.targets):
            logits = first_tensor(lm.model(**padded.inputs, use_cache=False).logits)[0]
        token = nn.functional.cross_entropy(logits.float(), padded.labels, reduction="none")
        nll = mean_by(token, padded.owners, len(part))
        ((nll - hp.floor).clamp(min=0) * weight[part]).sum().backward()
        total += float((nll.detach() * weight[part]).sum())
    return total


def _keep(lm: LM, left: dict[str, Tensor], right: dict[str, Tensor], rows: Sequence[Row], strength: float, hp: Refine) -> float:
    """Mean KL(unedited || edited) over the scored positions of ``rows``; ``strength`` times its gradient is added to the left factors."""
    total, count = 0.0, sum(len(r.ids) - r.prompt_length for r in rows)
    for part in by_length([len(r.ids) for r in rows], hp.batch_tokens):
        padded = batch([rows[i] for i in part], lm.pad_id, lm.device)
        with at_scored_positions(lm.model.get_output_embeddings(), padded.targets):
            with torch.no_grad():
                base = first_tensor(lm.model(**padded.inputs, use_cache=False).logits)[0]
            with stack([on_output(lm.layout.module(lm.model, name), low_rank_hook(left[name], right[name])) for name in left]):
                edited = first_tensor(lm.model(**padded.inputs, use_cache=False).logits)[0]
        loss = kl(base, edited).sum() / count
        (strength * loss).backward()
        total += float(loss.detach())
    return total
