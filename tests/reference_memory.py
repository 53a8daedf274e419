"""GRACE and WISE as their papers have them, written down literally: float64, one edit and one prompt at a time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

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


def grace_logits(lm: object, ids: Sequence[int], end: int, name: str, read: object, where: str) -> Tensor:
    """Logits (length, vocabulary) of one unpadded sequence whose prompt ends at ``end``: one whole pass, no cache.

    Args:
        read: function: input at the prompt's end -> value, or None.
    """

    def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs, flat = args[0].reshape(len(ids), -1), output.reshape(len(ids), -1).clone()
        value = read(inputs[end])  # type: ignore[operator]
        if value is not None:
            for at in {"last": [end], "prompt": range(end + 1), "all": range(len(ids))}[where]:
                flat[at] = value.to(flat.dtype)
        return flat.reshape(output.shape)

    model = lm.model  # type: ignore[attr-defined]
    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits
