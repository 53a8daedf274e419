"""Terms: what a loss is made of. Plain records, so that settings can name losses without loading torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from editunlearn.unlearners.losses import Scored
    from editunlearn.unlearners.rows import Pool


@dataclass(frozen=True)
class Inside:
    """States of one block where a label comes next.

    Attributes:
        now, base: (n, width), of the model as it is trained and of the unedited one.
        owners: (n,) number of the row of each. count: rows.
    """

    now: Tensor
    base: Tensor
    owners: Tensor
    count: int


@dataclass(frozen=True)
class View:
    """What a loss sees of some rows.

    Attributes:
        now, base: of the model as it is trained and of the unedited one, which gets no gradient.
        inside: for a term with a layer.
    """

    now: Scored
    base: Scored
    inside: Inside | None = None


@dataclass(frozen=True)
class Price:
    """A weight that rises while a loss is above what is allowed (dual ascent)."""

    start: float
    rate: float
    allowed: float
    warmup: int
    """Epochs in which it stays as it is."""


@dataclass(frozen=True)
class Term:
    """One part of a loss.

    Attributes:
        name: what progress calls it.
        pools: names of the pools that it takes a row of each from.
        loss: of the rows' views, in the order of ``pools``, one number for each row, which are averaged.
        weight: times this, or a price.
        ratio: for a pool that belongs to no fact, rows for each fact of an update.
        layer: block whose states the loss reads.
        shared: of the views of all rows of the update, without gradient, one number that ``loss`` gets last.
    """

    name: str
    pools: tuple[str, ...]
    loss: Callable[..., Tensor]
    weight: float | Price = 1.0
    ratio: float = 1.0
    layer: int | None = None
    shared: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Objective:
    """What a method minimises.

    Attributes:
        terms: added up.
        pools: makes the rows of each pool that the terms name.
    """

    terms: tuple[Term, ...]
    pools: dict[str, Callable[[], Pool]]
