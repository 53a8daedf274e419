"""Side memories beside one linear map: a sequence whose prompt wakes one goes through the map as it changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from editunlearn.lm.sequences import Watcher
from editunlearn.numerics.side import activation, latest, middles, route, spared


@dataclass(frozen=True)
class SideMemory:
    """WISE's memories (https://arxiv.org/abs/2405.14768, section 2.3), the archive that the active one is found in.

    The map itself, with its bias and in whatever way it is stored, goes on to work; updates are added to its output.

    Attributes:
        updates: (n, d_out, d_in) float32.
        thresholds: (n,) float32, how active an update must be.
        marks: (m, d_in) float32, mean inputs of the facts' prompts.
        owners: (m,) float32, number of the memory of each fact; -1 once it was taken out, and read no more.
        window: of a prompt, the last so many tokens are looked at; None: all.
        most: of these, the so many that an update does most to; None: all.

    Raises:
        ValueError: the shapes do not fit.
    """

    updates: Tensor
    thresholds: Tensor
    marks: Tensor
    owners: Tensor
    window: int | None = None
    most: int | None = None

    KIND: ClassVar[Literal["side"]] = "side"
    PARTS: ClassVar[tuple[str, ...]] = ("updates", "thresholds", "marks", "owners")

    def __post_init__(self) -> None:
        if self.updates.ndim != 3 or self.thresholds.shape != (len(self.updates),):
            shapes = tuple(self.updates.shape), tuple(self.thresholds.shape)
            raise ValueError(f"updates and thresholds of side memories have shapes {shapes[0]} and {shapes[1]}")
        if self.marks.shape != (len(self.owners), self.updates.shape[2]):
            shapes = tuple(self.marks.shape), tuple(self.owners.shape)
            raise ValueError(f"marks and owners of side memories have shapes {shapes[0]} and {shapes[1]}")
        if any(getattr(self, part).dtype != torch.float32 for part in self.PARTS):
            raise ValueError("tensors of side memories must be float32")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> SideMemory:
        """From its parts and ``settings``; raises ValueError when they do not fit."""
        window, most = (settings.get(name) for name in ("window", "most"))
        if any(x is not None and (not isinstance(x, int) or x < 1) for x in (window, most)):
            raise ValueError(f"a side memory looks at one token or more, not at window {window!r}, most {most!r}")
        return cls(**tensors, window=window, most=most)

    def settings(self) -> dict[str, Any]:
        """What is saved beside its parts."""
        return {"window": self.window, "most": self.most}

    @property
    def count(self) -> int:
        """Memories."""
        return len(self.updates)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the map."""
        return self.updates.shape[1], self.updates.shape[2]

    @property
    def operations(self) -> int:
        """Floating-point operations on a token of the prompt, which goes through all memories."""
        return 2 * self.updates.numel()

    def to(self, device: torch.device) -> SideMemory:
        """The same on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in self.PARTS})

    @property
    def divisible(self) -> bool:
        """Whether single facts of a memory can be taken out."""
        return len(self.marks) > 0

    @property
    def served(self) -> list[int]:
        """How many facts each memory is read for."""
        return [int((self.owners == number).sum()) for number in range(self.count)]

    def only(self, entries: list[int], stay: list[list[int]]) -> SideMemory:
        """Some of the memories, bit for bit, each read for those of its facts that ``stay`` numbers."""
        index = torch.tensor(entries, dtype=torch.long)
        owners = torch.full_like(self.owners, -1.0)
        for new, (old, own) in enumerate(zip(entries, stay, strict=True)):
            owners[(self.owners == old).nonzero()[:, 0][own]] = new
        return replace(self, updates=self.updates[index], thresholds=self.thresholds[index], owners=owners)

    def awake(self) -> SideMemory:
        """The same, woken by every prompt: what it costs at most."""
        return replace(self, thresholds=torch.zeros_like(self.thresholds), owners=self.owners.clamp(min=0))

    def joined(self, other: SideMemory) -> SideMemory:
        """Both archives in one.

        Raises:
            ValueError: they look at prompts in different ways.
        """
        if self.settings() != other.settings():
            raise ValueError(
                f"one side memory looks at prompts with {self.settings()}, the other with {other.settings()}"
            )
        later = torch.where(other.owners < 0, other.owners, other.owners + self.count)
        both: dict[str, Any] = {part: torch.cat([getattr(self, part), getattr(other, part)]) for part in self.PARTS}
        return replace(self, **{**both, "owners": torch.cat([self.owners, later])})

    def change(self, name: str, watcher: Watcher) -> Callable[[Tensor, Tensor], Tensor | None]:
        """What a hook on the map does with its input and output; decides once a sequence, by its whole prompt."""

        def change(inputs: Tensor, output: Tensor) -> Tensor | None:
            piece = watcher.piece
            wide = piece.rows(inputs).float()
            if not piece.decoding:
                prompt = latest(piece.prompt.to(wide.device), self.window)
                own, owner = wide[prompt], prompt.nonzero()[:, 0]
                active = [activation(own, update, owner, len(prompt), self.most) for update in self.updates]
                chosen = route(torch.stack(active, 1), self.thresholds)
                out = spared(middles(own, owner, len(prompt)), self.marks, self.owners)
                piece.kept[name] = torch.where(out, -1, chosen)
            chosen = piece.kept[name].to(wide.device)
            if bool((chosen < 0).all()):
                return None
            changed = piece.rows(output).clone()
            for number in sorted({n for n in chosen.tolist() if n >= 0}):
                rows = chosen == number
                changed[rows] = (changed[rows].float() + wide[rows] @ self.updates[number].T).to(changed.dtype)
            return changed.reshape(output.shape)

        return change
