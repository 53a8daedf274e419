"""GRACE's codebook (https://arxiv.org/abs/2211.11031, algorithm 1): balls around keys that grow, and give way.

Distances are Euclidean, taken by differences: a matrix product would lose what tells close keys apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Replace = Literal["last", "prompt", "all"]


@dataclass(frozen=True)
class Balls:
    """What keys were made into.

    Attributes:
        centres: for each ball, which key it is around.
        radii: (balls,) float64.
        members: for each key, the ball that it started or joined.
    """

    centres: list[int]
    radii: Tensor
    members: list[int]


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Euclidean distances (m, n) of queries (m, d) and keys (n, d)."""
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(queries: Tensor, keys: Tensor, radii: Tensor) -> Tensor:
    """For each query (m, d) the number of the nearest key (n, d) if it is within that key's radius (n,), else -1."""
    if len(keys) == 0:
        return torch.full((len(queries),), -1, device=queries.device)
    distance, index = distances(queries, keys).min(1)
    return torch.where(distance <= radii.to(distance)[index], index, -1)


def balls(keys: Tensor, labels: Sequence[Hashable], start: Tensor, settled: int = 0) -> Balls:
    """Put keys into a codebook one after the other.

    A key that is further from the nearest centre than the two radii together starts a ball. Otherwise the nearest
    ball grows to reach it, if both have one label; if not, the key starts a ball as well, and the two meet half-way.
    Other than in the published code no ball grows by giving way.

    Args:
        keys: (n, d), in order.
        labels: what each key is for; compared by equality.
        start: (n,) radius of a ball that a key starts.
        settled: the first so many keys are centres already, with these radii.
    """
    apart, start = distances(keys.double(), keys.double()), start.double()
    centres, members = list(range(settled)), list(range(settled))
    radii: list[float] = start[:settled].tolist()
    for number in range(settled, len(labels)):
        label, radius = labels[number], float(start[number])
        to_centres = apart[number, centres]
        near = int(to_centres.argmin()) if centres else -1
        distance = float(to_centres[near]) if centres else float("inf")
        meets = bool(centres) and distance <= radius + radii[near]
        if meets and labels[centres[near]] == label:
            radii[near] = max(radii[near], distance)
            members.append(near)
            continue
        if meets:
            radii[near], radius = min(radii[near], distance / 2), min(radius, distance / 2)
        members.append(len(centres))
        centres.append(number)
        radii.append(radius)
    return Balls(centres, torch.tensor(radii, dtype=torch.float64), members)


def clear_of(radii: Tensor, centres: Tensor, others: Tensor, share: float) -> Tensor:
    """Radii (n,) of balls at ``centres`` (n, d), cut to ``share`` of the way to the nearest of ``others`` (m, d)."""
    if len(others) == 0:
        return radii
    return torch.minimum(radii, share * distances(centres, others).min(1).values.to(radii))


def replaced(mask: Tensor, ends: Tensor, how: Replace) -> Tensor:
    """Where a found value replaces the output, (rows, length) bool.

    Args:
        mask: (rows, length) bool, False for padding.
        ends: (rows,) index of the prompt's last token.
        how: at that token, at all tokens up to it, or at all tokens, those of the answer too.
    """
    index = torch.arange(mask.shape[1], device=mask.device)
    end = ends.to(mask.device)[:, None]
    return {"last": mask & (index == end), "prompt": mask & (index <= end), "all": mask}[how]
