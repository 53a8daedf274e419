"""The unlearning losses, written down literally: float64, one row and one position after the other, no tricks.

``logits`` (rows, length, vocabulary), ``labels`` (rows, length) with -100 where there is none. Label t is predicted by
the logits at t - 1. Every function gives a list with one number a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def positions(logits: Tensor, labels: Tensor, row: int) -> Iterator[tuple[Tensor, int]]:
    """(logits, label) of one row's predictions."""
    for t in range(1, labels.shape[1]):
        if int(labels[row, t]) != -100:
            yield logits[row, t - 1].double(), int(labels[row, t])


def rows(logits: Tensor, labels: Tensor, each: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """Mean of ``each`` over a row's positions."""
    found = []
    for row in range(len(labels)):
        values = [each(z, y) for z, y in positions(logits, labels, row)]
        found.append(sum(values, torch.tensor(0.0, dtype=torch.float64)) / len(values))
    return found


def log_p(z: Tensor, y: int) -> Tensor:
    return torch.log(torch.exp(z[y]) / torch.exp(z).sum())


def total(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """log p of each row's answer."""
    return [
        sum((log_p(z, y) for z, y in positions(logits, labels, row)), torch.tensor(0.0, dtype=torch.float64))
        for row in range(len(labels))
    ]


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def nll(z: Tensor, y: Tensor) -> list[Tensor]:
    return rows(z, y, lambda z, y: -log_p(z, y))


def ascent(z: Tensor, y: Tensor) -> list[Tensor]:
    return rows(z, y, log_p)


def weighted_ascent(z: Tensor, y: Tensor, beta: float) -> list[Tensor]:
    return rows(z, y, lambda z, y: torch.exp(log_p(z, y)).detach() ** beta * log_p(z, y))


def saturation_importance(z: Tensor, y: Tensor, beta1: float, beta2: float) -> list[Tensor]:
    def each(z: Tensor, y: int) -> Tensor:
        p = torch.exp(log_p(z, y)).detach()
        return p**beta1 * (1 - p) ** beta2 * log_p(z, y)

    return rows(z, y, each)


def npo(z: Tensor, y: Tensor, base: Tensor, beta: float) -> list[Tensor]:
    return [-(2 / beta) * torch.log(sigma(-beta * (a - b))) for a, b in zip(total(z, y), total(base, y), strict=True)]


def simnpo(z: Tensor, y: Tensor, beta: float, delta: float) -> list[Tensor]:
    return [-(2 / beta) * torch.log(sigma(beta * (loss - delta))) for loss in nll(z, y)]


def dpo(
    z_won: Tensor, y_won: Tensor, base_won: Tensor, z_lost: Tensor, y_lost: Tensor, base_lost: Tensor, beta: float
) -> list[Tensor]:
    found = []
    for a, b, c, d in zip(
        total(z_won, y_won), total(base_won, y_won), total(z_lost, y_lost), total(base_lost, y_lost), strict=True
    ):
        found.append(-(2 / beta) * torch.log(sigma(beta * ((a - b) - (c - d)))))
    return found


def kto(z: Tensor, y: Tensor, base: Tensor, divergence: float, beta: float) -> list[Tensor]:
    return [
        1 - (2 / beta) * sigma(divergence - beta * (a - b)) for a, b in zip(total(z, y), total(base, y), strict=True)
    ]


def softmax(z: Tensor) -> Tensor:
    return torch.exp(z) / torch.exp(z).sum()


def divergence(z: Tensor, y: Tensor, base: Tensor) -> list[Tensor]:
    found = []
    for row in range(len(y)):
        both = zip(positions(z, y, row), positions(base, y, row), strict=True)
        values = [(softmax(b) * (torch.log(softmax(b)) - torch.log(softmax(a)))).sum() for (a, _), (b, _) in both]
        found.append(torch.stack(values).mean())
    return found


def undial(z: Tensor, y: Tensor, base: Tensor, beta: float) -> list[Tensor]:
    found = []
    for row in range(len(y)):
        values = []
        for (a, true), (b, _) in zip(positions(z, y, row), positions(base, y, row), strict=True):
            lowered = b.clone()
            lowered[true] -= beta
            values.append(-(softmax(lowered) * torch.log(softmax(a))).sum())
        found.append(torch.stack(values).mean())
    return found


def ce_u(z: Tensor, y: Tensor, skipped: int) -> list[Tensor]:
    found = []
    for row in range(len(y)):
        values = []
        for a, true in list(positions(z, y, row))[skipped:]:
            others = [v for v in range(len(a)) if v != true]
            aim = (torch.exp(a[others]) / torch.exp(a[others]).sum()).detach()
            values.append(-(aim * torch.log(softmax(a))[others]).sum())
        found.append(torch.stack(values).mean())
    return found


def inverted_hinge(z: Tensor, y: Tensor) -> list[Tensor]:
    def each(z: Tensor, y: int) -> Tensor:
        p = softmax(z)
        return 1 + p[y] - max(p[v] for v in range(len(p)) if v != y)

    return rows(z, y, each)


def flatness(z: Tensor, y: Tensor) -> list[Tensor]:
    return rows(z, y, lambda z, _: (z.max() - z.mean()) ** 2)


def misdirection(states: Tensor, aim: Tensor) -> float:
    """Of one row's states (n, width)."""
    return sum(
        sum((float(h) - float(a)) ** 2 for h, a in zip(state, aim, strict=True)) / sum(float(a) ** 2 for a in aim)
        for state in states
    ) / len(states)
