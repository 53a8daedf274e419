"""GRACE and WISE as their papers have them, written down literally: float64, one edit and one prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class GraceCodebook:
    """GRACE (arXiv 2211.11031), algorithm 1: lists of keys, radii and labels, in the order in which they came."""

    keys: list[Tensor] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    labels: list[Hashable] = field(default_factory=list)

    def edit(self, key: Tensor, label: Hashable, start: float) -> int:
        """Add one edit; the number of the entry that it is in."""
        key = key.double()
        if not self.keys:
            return self._add(key, label, start)
        near, s = self.nearest(key)
        if s > start + self.radii[near]:
            return self._add(key, label, start)
        if self.labels[near] == label:
            if s > self.radii[near]:
                self.radii[near] = s
            return near
        # split: half of the way each (here no ball grows by it)
        self.radii[near] = min(self.radii[near], s / 2)
        return self._add(key, label, min(start, s / 2))

    def _add(self, key: Tensor, label: Hashable, radius: float) -> int:
        self.keys.append(key)
        self.labels.append(label)
        self.radii.append(radius)
        return len(self.keys) - 1

    def nearest(self, query: Tensor) -> tuple[int, float]:
        """Number of the nearest key, and how far it is."""
        far = [float((query.double() - key).square().sum().sqrt()) for key in self.keys]
        return min(range(len(far)), key=far.__getitem__), min(far)

    def read(self, query: Tensor) -> int | None:
        """The entry whose value replaces the output; None: the output stays."""
        near, s = self.nearest(query)
        return near if s <= self.radii[near] else None


def grace_codebook(
    keys: Tensor, labels: Sequence[Hashable], starts: Sequence[float]
) -> tuple[GraceCodebook, list[int]]:
    """The codebook after all edits, and the entry that each went to."""
    book = GraceCodebook()
    return book, [book.edit(k, label, s) for k, label, s in zip(keys, labels, starts, strict=True)]


def grace_logits(lm: Any, ids: Sequence[int], end: int, name: str, read: Any, where: str) -> Tensor:
    """Logits (length, vocabulary) of one unpadded sequence whose prompt ends at ``end``: one whole pass, no cache.

    Args:
        read: function: input at the prompt's end -> value, or None.
    """

    def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs, flat = args[0].reshape(len(ids), -1), output.reshape(len(ids), -1).clone()
        value = read(inputs[end])
        if value is not None:
            for at in {"last": [end], "prompt": range(end + 1), "all": range(len(ids))}[where]:
                flat[at] = value.to(flat.dtype)
        return flat.reshape(output.shape)

    handle = lm.model.get_submodule(name).register_forward_hook(hook)
    try:
        with torch.no_grad():
            return _logits(lm.model, ids)
    finally:
        handle.remove()


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


# --- WISE (arXiv 2405.14768)


class WiseModel:
    """A float64 copy of a model whose weight W at one place is exchanged for W + U, U a leaf.

    Args:
        update: (d_out, d_in).
    """

    def __init__(self, lm: Any, name: str, update: Tensor) -> None:
        self.model = copy.deepcopy(lm.model).double()
        self.update = update.double().clone().requires_grad_(True)
        self.module = self.model.get_submodule(name)
        weight = self.module._parameters.pop("weight").detach()
        stored = self.update.T if lm.layout.is_transposed(lm.model, name) else self.update
        self.module.weight = weight + stored
        self.bare = weight

    def logits(self, ids: Sequence[int], *, side: bool = True) -> Tensor:
        """Of the model with W + U, or with W."""
        own = self.module.weight
        self.module.weight = own if side else self.bare
        try:
            return _logits(self.model, ids)
        finally:
            self.module.weight = own

    def activation(self, ids: Sequence[int], window: int | None = None, most: int | None = None) -> Tensor:
        """Eq. 3: mean over the tokens of a prompt (``most`` largest of the last ``window``) of norm(A(x) (W' - W))."""
        seen: list[Tensor] = []
        handle = self.module.register_forward_hook(lambda _m, args, _o: seen.append(args[0].reshape(len(ids), -1)))
        try:
            with torch.no_grad():
                self.logits(ids)
        finally:
            handle.remove()
        norms = [(self.update @ x).norm() for x in seen[0].detach()][-window if window else None :]
        return torch.stack(sorted(norms, key=lambda n: float(n.detach()))[-most if most else None :]).mean()


def wise_loss(
    model: WiseModel,
    edits: Sequence[tuple[Sequence[int], int]],
    keep: Sequence[Sequence[int]],
    bounds: tuple[float, float, float],
    weight: float,
    window: int | None = None,
    most: int | None = None,
) -> Tensor:
    """Eqs. 5 and 6: NLL of the targets, and the margins, each over the prompts that break it.

    Args:
        edits: (ids of prompt and target, length of the prompt).
        keep: ids of prompts to keep.
        bounds: alpha, beta, gamma.
    """
    alpha, beta, gamma = bounds
    nll = []
    for ids, prompt in edits:
        p = model.logits(ids).log_softmax(-1)
        nll.append(-torch.stack([p[at - 1, ids[at]] for at in range(prompt, len(ids))]).mean())
    inside = [model.activation(ids[:prompt], window, most) for ids, prompt in edits]
    outside = [model.activation(ids, window, most) for ids in keep]
    terms = [
        [beta - i for i in inside if i < beta],
        [o - alpha for o in outside if o > alpha],
        [gamma - (i - o) for i in inside for o in outside if i - o < gamma],
    ]
    margins = [torch.stack(term).mean() for term in terms if term]
    return torch.stack(nll).mean() + weight * sum(margins, torch.zeros(()))


def wise_step(update: Tensor, grad: Tensor, mask: Tensor, rate: float, clamp: float) -> Tensor:
    """One step of gradient descent on the masked entries, which then stay within ``clamp`` of W."""
    new = update.double().clone()
    for at in mask.nonzero().tolist():
        new[tuple(at)] -= rate * grad[tuple(at)]
    return new.clamp(-clamp, clamp)


def wise_route(activations: Sequence[float], thresholds: Sequence[float]) -> int | None:
    """Eq. 4 over an archive: the most active memory of those above their thresholds."""
    awake = [n for n, (a, t) in enumerate(zip(activations, thresholds, strict=True)) if a >= t]
    return max(awake, key=lambda n: activations[n]) if awake else None


def spared(inputs: Tensor, owner: Sequence[int], marks: Tensor, owners: Sequence[float]) -> list[bool]:
    """Of each sequence whether the fact that is nearest by mean input was taken out, and is not there again."""
    found = []
    for sequence in range(max(owner) + 1):
        own = [x.double() for x, of in zip(inputs, owner, strict=True) if of == sequence]
        middle = sum(own, torch.zeros_like(own[0])) / len(own)
        far = [float((middle - mark.double()).square().sum()) for mark in marks]
        nearest = [gone < 0 for d, gone in zip(far, owners, strict=True) if d == min(far)]
        found.append(all(nearest))
    return found


def ties(updates: Sequence[Tensor], density: float) -> Tensor:
    """TIES (arXiv 2306.01708): trim, elect signs, take the mean of those that agree; entry by entry."""
    flat = [u.double().flatten().clone() for u in updates]
    for u in flat:
        order = u.abs().argsort(descending=True)
        u[order[round(density * len(u)) :]] = 0.0
    merged = torch.zeros_like(flat[0])
    for at in range(len(merged)):
        entries = [float(u[at]) for u in flat]
        sign = 1 if sum(entries) > 0 else -1
        agree = [e for e in entries if e * sign > 0]
        merged[at] = sum(agree) / len(agree) if agree and sum(entries) != 0 else 0.0
    return merged.reshape(updates[0].shape)
