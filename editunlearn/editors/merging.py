"""Query merging (arXiv 2505.19855): several facts share one value, and perhaps one key, so that many become few.

How the paper groups is not known; the ways here are this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.editors.value_types import Problem, Values
from editunlearn.facts.readers import comparable

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import Merge


@dataclass(frozen=True)
class Groups:
    """Which facts go together.

    Attributes:
        members: numbers of the facts of each group, rising; every fact is in one group.
        keys: ``sample``: every fact has its own key; ``group``: a group has one, the mean of its members'.
        optimised: of each group at most so many members take part in finding the value.
    """

    members: tuple[tuple[int, ...], ...]
    keys: str = "sample"
    optimised: int = 1

    @property
    def shape(self) -> str:
        """How many groups of how many facts, in words."""
        sizes = [len(group) for group in self.members]
        return f"{sum(sizes)} facts in {len(sizes)} groups of {min(sizes)} to {max(sizes)}"

    @property
    def owner(self) -> list[int]:
        """The group of each fact."""
        found = {fact: number for number, group in enumerate(self.members) for fact in group}
        return [found[fact] for fact in range(len(found))]

    def problems(self, each: Sequence[Problem]) -> list[Problem]:
        """What the value of each group is optimised on: all of its members' rows, the bare prompts first."""
        found = []
        for group in self.members:
            parts = [each[fact] for fact in group[: self.optimised]]
            bare, behind = [part.rows[0] for part in parts], [row for part in parts for row in part.rows[1:]]
            found.append(Problem((*bare, *behind), tuple(row for part in parts for row in part.pinned)))
        return found

    def values(self, found: Values) -> Values:
        """Of each fact its group's."""
        owner = torch.tensor(self.owner)
        return Values(*(getattr(found, name)[owner] for name in Values.NAMES))

    def columns(self, of_facts: Tensor) -> Tensor:
        """Rows of facts -> rows of the columns of the edit: as they are, or the mean of each group."""
        if self.keys == "sample":
            return of_facts
        return torch.stack([of_facts[list(group)].mean(0) for group in self.members])

    def ids(self, facts: Sequence[Fact]) -> list[str | None]:
        """For each column the id of its fact, None where it serves several."""
        if self.keys == "sample":
            return [fact.id for fact in facts]
        return [facts[group[0]].id if len(group) == 1 else None for group in self.members]


def alone(count: int) -> Groups:
    """Nothing is merged."""
    return Groups(tuple((fact,) for fact in range(count)))


def groups(facts: Sequence[Fact], hp: Merge, keys: Tensor | None) -> Groups:
    """Group facts; only facts with the same target go together, and a group's first facts are the request's first.

    Args:
        keys: (facts, d_in), for ``by: key``.
    """
    by_target: dict[str | None, list[int]] = {}
    for number, fact in enumerate(facts):
        by_target.setdefault(fact.target, []).append(number)
    found = [group for members in by_target.values() for group in _divided(members, facts, hp, keys)]
    return Groups(tuple(sorted(map(tuple, found))), hp.keys, hp.size)


def _divided(members: list[int], facts: Sequence[Fact], hp: Merge, keys: Tensor | None) -> list[list[int]]:
    if hp.by == "all":
        return [members]
    if hp.by == "run":
        return _runs(members, hp.size)
    if hp.by == "subject":
        by_subject: dict[str, list[int]] = {}
        for number in members:
            by_subject.setdefault(comparable(facts[number].subject), []).append(number)
        return [run for group in by_subject.values() for run in _runs(group, hp.size)]
    assert keys is not None  # noqa: S101 - the caller gives them for this way
    return _alike(members, keys, hp.size)


def _runs(members: list[int], size: int) -> list[list[int]]:
    return [members[i : i + size] for i in range(0, len(members), size)]


def _alike(members: list[int], keys: Tensor, size: int) -> list[list[int]]:
    """Groups of ``size`` on average by the angle between keys (average linkage)."""
    from sklearn.cluster import AgglomerativeClustering

    count = -(-len(members) // size)
    if count == len(members):
        return [[number] for number in members]
    model = AgglomerativeClustering(n_clusters=count, metric="cosine", linkage="average")
    labels = model.fit_predict(keys[members].double().numpy())
    return [[m for m, label in zip(members, labels, strict=True) if label == group] for group in range(count)]
