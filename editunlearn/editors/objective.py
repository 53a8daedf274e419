"""What one step of refine minimises: its losses, and the gradient they put on the left factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.batching import by_length, halving, tightly
from editunlearn.lm.head import Head, hidden_of
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Batch, Row, batch
from editunlearn.numerics import losses

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM


def hidden_at_targets(lm: LM, padded: Batch) -> Tensor:
    """States before the head that predict the target tokens of a batch, (number of target tokens, width)."""
    run = padded.but_last()
    return hidden_of(lm, run.targets, lambda: forward(lm.model, run))


class Gradient:
    """The gradient of the left factors, summed over batches.

    A batch that runs out of memory adds nothing and is halved.

    Attributes:
        batch_tokens: padded tokens of one batch.
    """

    def __init__(self, left: Mapping[str, Tensor], batch_tokens: int, warn: Callable[[str], None]) -> None:
        self.left, self.batch_tokens, self.warn = left, batch_tokens, warn

    def over(self, rows: Sequence[Row], run: Callable[[Sequence[int]], None]) -> None:
        """Call ``run`` with the numbers of the rows of one batch after the other."""

        def undone(part: Sequence[int]) -> None:
            before = {name: None if v.grad is None else v.grad.clone() for name, v in self.left.items()}
            try:
                run(part)
            except BaseException:
                for name, value in self.left.items():
                    value.grad = before[name]
                raise

        on_cpu = all(value.device.type == "cpu" for value in self.left.values())
        divide = tightly if on_cpu else by_length  # a GPU is faster with few passes than with little padding
        halving(divide([len(r.ids) - 1 for r in rows], self.batch_tokens), undone, self.warn)

    def scale(self, factor: float) -> None:
        """Multiply what has been summed up."""
        for value in self.left.values():
            if value.grad is not None:
                value.grad *= factor


def forget_loss(head: Head, facts: Sequence[Sequence[Row]], gradient: Gradient, floor: float) -> Tensor:
    """NLL of the targets, mean over tokens plus the largest; its weighted gradient is put on the left factors.

    One token that is not the likeliest sends greedy decoding astray, however well the others are learned. A row's
    weight is its excess over the floor relative to the mean excess: most facts are done long before the last, and what
    counts is that none is left.

    Returns:
        Mean over its rows for each fact, (facts,) float32.
    """
    rows = [row for fact in facts for row in fact]
    shares = [1 / (len(fact) * len(facts)) for fact in facts for _ in fact]
    lm = head.lm
    weight = torch.tensor(shares, device=lm.device)
    owner = [number for number, fact in enumerate(facts) for _ in fact]
    found = torch.zeros(len(rows), device=lm.device)
    mean_excess = 0.0

    def run(part: Sequence[int]) -> None:
        nonlocal mean_excess
        padded = batch([rows[i] for i in part], lm.pad_id, lm.device)
        token = head.cross_entropy(hidden_at_targets(lm, padded), padded.labels)
        nll = losses.mean_by(token, padded.owners, len(part)) + losses.largest_by(token, padded.owners, len(part))
        excess = (nll - floor).clamp(min=0)
        # the gradient of half the square is the excess times the gradient; the mean is known after the last part
        (0.5 * excess.square() * weight[part]).sum().backward()  # type: ignore[no-untyped-call]
        found[list(part)] = nll.detach()
        mean_excess += float((excess.detach() * weight[part]).sum())

    gradient.over(rows, run)
    if mean_excess > 0:
        gradient.scale(1 / mean_excess)
    return losses.mean_by(found, torch.tensor(owner, device=lm.device), len(facts))


@torch.no_grad()
def learned(head: Head, rows: Sequence[Row], gradient: Gradient) -> Tensor:
    """Of each prompt 1 if greedy decoding would write the target behind it, else 0, (rows,) float32.

    The first token must be the target's, and one of the others at most may differ: behind some prompts a model writes
    another apostrophe, say, which changes nothing. All tokens before are given.
    """
    right = torch.zeros(len(rows))

    def run(part: Sequence[int]) -> None:
        padded = batch([rows[i] for i in part], head.lm.pad_id, head.lm.device)
        wrong = (head.likeliest(hidden_at_targets(head.lm, padded)) != padded.labels).float()
        sizes = padded.owners.bincount(minlength=len(part))
        first = wrong[sizes.cumsum(0) - sizes]
        others = torch.zeros_like(first).index_add(0, padded.owners, wrong) - first
        right[list(part)] = ((first == 0) & (others <= 1)).float().cpu()

    gradient.over(rows, run)
    return right


class Keep:
    """Prompts or text whose next-token distributions are to stay those of the unedited model.

    Of the unedited model only the hidden states before the head are kept (a few kilobytes a row), found when a row
    first comes up.
    """

    def __init__(self, head: Head, rows: Sequence[Row], gradient: Gradient) -> None:
        self.head, self.lm, self.rows, self.gradient = head, head.lm, rows, gradient
        self.hidden: dict[int, Tensor] = {}

    def loss(self, change: Callable[[], AbstractContextManager[None]], chosen: Sequence[int], strength: float) -> float:
        """Mean KL(unedited || edited) over the scored positions of the rows ``chosen``.

        Adds ``strength`` times its gradient to the left factors.

        Args:
            change: makes a context in which the model computes with the edit.
        """
        count = sum(len(self.rows[i].ids) - self.rows[i].prompt_length for i in chosen)
        total = 0.0

        def run(part: Sequence[int]) -> None:
            nonlocal total
            members, padded = self._batch(chosen, part)
            self._remember(members, padded)
            with change():
                edited = hidden_at_targets(self.lm, padded)
            loss = self.head.kl(torch.cat([self.hidden[i] for i in members]), edited).sum() / count
            if strength > 0:
                (strength * loss).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())

        self.gradient.over([self.rows[i] for i in chosen], run)
        return total

    def remember(self, chosen: Sequence[int]) -> None:
        """Keep what ``loss`` would of the unedited model, in the same batches, so that no bit of it differs."""
        self.gradient.over([self.rows[i] for i in chosen], lambda part: self._remember(*self._batch(chosen, part)))

    def _batch(self, chosen: Sequence[int], part: Sequence[int]) -> tuple[list[int], Batch]:
        members = [chosen[i] for i in part]
        return members, batch([self.rows[i] for i in members], self.lm.pad_id, self.lm.device)

    @torch.no_grad()
    def _remember(self, members: Sequence[int], padded: Batch) -> None:
        if all(i in self.hidden for i in members):
            return
        sizes = [len(self.rows[i].ids) - self.rows[i].prompt_length for i in members]
        for i, states in zip(members, torch.split(hidden_at_targets(self.lm, padded), sizes), strict=True):
            self.hidden.setdefault(i, states)


class AtKeptKeys:
    """How much the edit changes the sites' outputs at keys to keep, relative to how much the closed form does.

    A step sees a few prompts to keep; this sees every key of them, and costs a product of the size of the batch of
    facts. For a change ``L B`` (left factors ``L`` (d_out, n), recognisers ``B`` (n, d_in)) and keys ``K`` (m, d_in)
    it is ``|L B K^T|^2``, divided by what it is for the closed form's ``L``; mean over the sites.

    Args:
        factors: the closed form's, by module: left and right.
        keys: keys to keep, by module, (m, d_in); modules of none are left out.
    """

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]], keys: Mapping[str, Tensor]) -> None:
        self.forms: dict[str, Tensor] = {}
        for name, (left, right) in factors.items():
            answers = keys[name].double() @ right.double().T
            form = answers.T @ answers
            whole = float((left.double() @ form * left.double()).sum())
            if whole > 0:
                self.forms[name] = (form / whole).float().to(left.device)

    @torch.no_grad()
    def loss(self, left: Mapping[str, Tensor], strength: float) -> float:
        """Its value; adds ``strength`` times its gradient to ``left``."""
        total = 0.0
        for name, form in self.forms.items():
            value = left[name]
            slope = value @ form.to(value.device) / len(self.forms)
            total += float((slope * value).sum())
            grad = 2 * strength * slope
            value.grad = grad if value.grad is None else value.grad + grad
        return total
