"""What a value is optimised on, what is found, and the finished part of an unfinished run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from editunlearn.lm.tokens import Row
from editunlearn.numerics.codebook import Replace

if TYPE_CHECKING:
    from editunlearn.workspace import Workspace


@dataclass(frozen=True)
class Standing:
    """Changes of outputs at other tokens of a problem's rows, at work while its value is found.

    Attributes:
        tokens: for each row of the problem k tokens, all before its lookup token.
        change: (k, m, d_out) float32.
    """

    tokens: tuple[tuple[int, ...], ...]
    change: Tensor


@dataclass(frozen=True)
class Problem:
    """What one fact is optimised on.

    Attributes:
        rows: prompt with target, one row a context, the bare prompt first.
        pinned: prompts whose next-token distribution is to stay as it is (may be empty); read at the last token, or,
            as published, at the lookup token.
        standing: what is changed already elsewhere in ``rows``.
        name: what messages call it; "": fact number so and so.
    """

    rows: tuple[Row, ...]
    pinned: tuple[Row, ...] = ()
    standing: Standing | None = None
    name: str = ""


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

    @classmethod
    def of(cls, parts: Sequence[Values]) -> Values:
        """Those of single facts together."""
        return cls(*(torch.stack([getattr(part, name) for part in parts]) for name in cls.NAMES))


@dataclass(frozen=True)
class Replacing:
    """Values that replace outputs, whatever stands there, instead of being added to them.

    Attributes:
        where: which outputs of a row, the lookup token being the end of its prompt.
        start: (n, m, d_out) what they are at first; None: the clean output of the bare prompt.
    """

    where: Replace
    start: Tensor | None = None

    def of(self, part: Sequence[int]) -> Replacing:
        """For some of the problems."""
        return Replacing(self.where, None if self.start is None else self.start[list(part)])


class Store:
    """Finished batches of values in a workspace.

    Args:
        turn: tells sets of problems of one run apart.
    """

    def __init__(self, work: Workspace | None, turn: int = 0) -> None:
        self.work, self.turn = work, turn
        self.names: list[str] = []

    def _name(self, part: Sequence[int]) -> str:
        return f"values-{self.turn}-" + hashlib.sha256(repr(list(part)).encode()).hexdigest()[:16]

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
