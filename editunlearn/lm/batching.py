"""Work in batches that fit: sorted by length, bounded in tokens, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
TOKENS = 4096
"""Padded tokens of one batch when nothing else is asked for."""

A_PASS = 48
"""Tokens that a pass costs beside those in it: reading the weights, and operations that take their time at any size."""


def by_length(lengths: Sequence[int], tokens: int = TOKENS, most: int | None = None) -> list[list[int]]:
    """Indices of the items in batches of at most ``tokens`` padded tokens (at least one item each), longest first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens and len(batches[-1]) != most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def tightly(lengths: Sequence[int], tokens: int = TOKENS) -> list[list[int]]:
    """Batches like those of :func:`by_length` that leave the least to do, on a device that computes padding, too.

    Of the rows sorted by length each batch is some in a row; what a batch costs is its padded tokens and ``A_PASS``.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best, cut = [0], [0]  # of the first so many rows: the least cost, and where the last batch begins
    for end in range(1, len(order) + 1):
        costs = []
        for start in range(end - 1, -1, -1):
            padded = (end - start) * lengths[order[start]]
            if padded > tokens and end - start > 1:
                break
            costs.append((best[start] + padded + A_PASS, start))
        cost, start = min(costs)
        best.append(cost)
        cut.append(start)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = cut[end]
    return batches[::-1]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def halving(batches: Sequence[Sequence[T]], run: Callable[[Sequence[T]], None], warn: Callable[[str], None]) -> None:
    """Call ``run`` on each batch; a batch that runs out of memory is halved and tried again.

    ``run`` must leave nothing behind when it fails.

    Raises:
        torch.OutOfMemoryError (or what the backend raised): a single item does not fit either.
    """
    waiting = [list(b) for b in reversed(batches)]
    while waiting:
        part = waiting.pop()
        try:
            run(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(part) == 1:
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            middle = len(part) // 2
            warn(f"out of memory with {len(part)} at once; going on with {middle}")
            waiting += [part[middle:], part[:middle]]


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
