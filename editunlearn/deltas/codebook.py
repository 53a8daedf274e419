"""A codebook beside one linear map: where the prompt ends near a key, the output is replaced by that key's value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from editunlearn.lm.sequences import Watcher
from editunlearn.numerics.codebook import Replace, balls, nearest, replaced


@dataclass(frozen=True)
class Codebook:
    """GRACE's memory (https://arxiv.org/abs/2211.11031, section 2).

    Attributes:
        keys: (n, d_in) float32, inputs of the map at the end of prompts.
        values: (n, d_out) float32, what it gives instead.
        radii: (n,) float32, how far from its key an input may be.
        where: which outputs of a sequence are replaced.

    Raises:
        ValueError: the shapes do not fit.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    where: Replace

    KIND: ClassVar[Literal["codebook"]] = "codebook"
    PARTS: ClassVar[tuple[str, ...]] = ("keys", "values", "radii")

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.keys, self.values, self.radii)]
        if self.keys.ndim != 2 or self.values.ndim != 2 or self.radii.shape != (len(self.keys),):
            raise ValueError(f"keys, values and radii of a codebook have shapes {shapes}")
        if len(self.values) != len(self.keys):
            raise ValueError(f"{len(self.keys)} keys and {len(self.values)} values in a codebook")
        if any(t.dtype != torch.float32 for t in (self.keys, self.values, self.radii)):
            raise ValueError("tensors of a codebook must be float32")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Codebook:
        """From its parts and ``settings``; raises ValueError when they do not fit."""
        where: Any = settings.get("where")
        if where not in get_args(Replace):
            raise ValueError(f"a codebook replaces outputs at last, prompt or all, not {where!r}")
        return cls(**tensors, where=where)

    def settings(self) -> dict[str, Any]:
        """What is saved beside its parts."""
        return {"where": self.where}

    @property
    def count(self) -> int:
        """Entries."""
        return len(self.keys)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the map."""
        return self.values.shape[1], self.keys.shape[1]

    @property
    def operations(self) -> int:
        """Floating-point operations of finding the nearest key; only at the end of a prompt."""
        return 3 * self.keys.numel()

    def to(self, device: torch.device) -> Codebook:
        """The same on a device."""
        return Codebook(self.keys.to(device), self.values.to(device), self.radii.to(device), self.where)

    @property
    def divisible(self) -> bool:
        """Whether single facts of an entry can be taken out: no, an entry is one value."""
        return False

    def only(self, entries: list[int], _stay: list[list[int]]) -> Codebook:
        """The codebook of some entries, bit for bit, with all facts that they serve."""
        index = torch.tensor(entries, dtype=torch.long)
        return replace(self, keys=self.keys[index], values=self.values[index], radii=self.radii[index])

    def awake(self) -> Codebook:
        """The same, with an entry that is near to every prompt: what it costs at most."""
        return replace(self, radii=torch.full_like(self.radii, torch.inf))

    def joined(self, other: Codebook) -> Codebook:
        """Both: where balls would meet, the other's give way to these, and these to them, half-way.

        Raises:
            ValueError: they replace outputs at different places.
        """
        if self.where != other.where:
            raise ValueError(f"one codebook replaces outputs at {self.where}, the other at {other.where}")
        keys, radii = torch.cat([self.keys, other.keys]), torch.cat([self.radii, other.radii])
        found = balls(keys, range(len(keys)), radii, settled=len(self.keys))
        return Codebook(keys, torch.cat([self.values, other.values]), found.radii.float(), self.where)

    def change(self, name: str, watcher: Watcher) -> Callable[[Tensor, Tensor], Tensor | None]:
        """What a hook on the map does with its input and output; decides once a sequence, at the end of its prompt."""

        def change(inputs: Tensor, output: Tensor) -> Tensor | None:
            piece = watcher.piece
            if not piece.decoding:
                at = piece.ends.to(inputs.device)
                rows = torch.arange(len(at), device=inputs.device)
                piece.kept[name] = nearest(piece.rows(inputs)[rows, at].float(), self.keys, self.radii)
            chosen = piece.kept[name].to(output.device)
            if bool((chosen < 0).all()) or (piece.decoding and self.where != "all"):
                return None
            ends = piece.ends if not piece.decoding else torch.zeros_like(piece.ends)
            where = replaced(piece.mask.to(output.device), ends, self.where) & (chosen >= 0)[:, None]
            value = self.values[chosen.clamp(min=0)].to(output.dtype)[:, None]
            return torch.where(where[..., None], value, piece.rows(output)).reshape(output.shape)

        return change
