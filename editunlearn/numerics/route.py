"""Where systems are solved and how: on which device, in which precision, how much of the keys at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["auto", "float64", "refined"]

FULL_RATE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of NVIDIA's data centre GPUs, whose float64 is a half of float32 or more; of others a 64th."""

FEW = 1 / 16
"""Right-hand sides, relative to the width, up to which float32 with refinement is less work than float64: a step of it
is a product with the whole matrix for each of them, in float64."""

ROWS = 4096
"""Keys that are on the device at one time."""


def _silent(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Route:
    """How the systems of one site are solved; keys and what is found stay where the keys are.

    Attributes:
        device: where the products and factors are made.
        precision: what was asked for. ``auto`` is float64, but where that is slow and the right-hand sides are few.
        tell: called with a sentence when float32 did not do.
        rows: keys that are on the device at one time.
    """

    device: torch.device = torch.device("cpu")
    precision: Precision = "auto"
    tell: Callable[[str], None] = _silent
    rows: int = ROWS

    def refined(self, width: int, right: int) -> bool:
        """Whether a system of this width is factored in float32 and refined, for so many right-hand sides."""
        if self.precision == "auto":
            return not fast_float64(self.device) and right <= FEW * width
        return self.precision == "refined"

    @property
    def keeps_inverses(self) -> bool:
        """Whether inverses come from the disk: a GPU should factor sooner than a disk reads."""
        return self.device.type == "cpu" and self.precision != "refined"

    def pieces(self, rows: Tensor) -> Iterator[Tensor]:
        """``rows`` (n, d) as float64 on the device, so many at a time."""
        for part in torch.split(rows, self.rows):
            yield part.to(self.device, torch.float64)

    def each(self, rows: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``run`` makes of each piece of ``rows`` (n, d), float64 where ``rows`` are."""
        made = [run(part).to(rows.device) for part in self.pieces(rows)]
        return torch.cat(made) if len(made) != 1 else made[0]

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """``left right^T`` (n, m) float64 on the device, of (n, d) and (m, d)."""
        if len(left) <= self.rows and len(right) <= self.rows:
            return left.to(self.device, torch.float64) @ right.to(self.device, torch.float64).T
        found = torch.empty(len(left), len(right), dtype=torch.float64, device=self.device)
        for i, some in enumerate(self.pieces(left)):
            for j, others in enumerate(self.pieces(right)):
                place = found.narrow(0, i * self.rows, len(some)).narrow(1, j * self.rows, len(others))
                place.copy_(some @ others.T)
        return found

    def add_squares(self, system: Tensor, rows: Tensor, weight: float = 1.0) -> Tensor:
        """``system`` (d, d), on the device, with ``weight * rows^T rows`` added in place."""
        for part in self.pieces(rows):
            system.addmm_(part.T, part, alpha=weight)
        return system


CPU = Route()
"""Float64 on the CPU."""


def fast_float64(device: torch.device) -> bool:
    """Whether float64 is not many times slower than float32 there."""
    if device.type != "cuda":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return major == 9 if torch.version.hip else (major, minor) in FULL_RATE


def able(device: torch.device) -> torch.device:
    """The device itself where it has float64 and its factorisations; else the CPU."""
    return device if device.type == "cuda" else torch.device("cpu")
