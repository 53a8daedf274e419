"""A delta that leaves the weights alone: memories beside some linear maps, read while the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from editunlearn.deltas.build import base_of, base_site, check_finite
from editunlearn.deltas.lowrank import LoadedModel, check_fits
from editunlearn.deltas.manifest import (
    BaseSite,
    MemoryManifest,
    MemorySite,
    check_composable,
    fact_set,
    hash_id,
    installed_versions,
)
from editunlearn.deltas.remembering import KINDS, Memory, beside
from editunlearn.deltas.side import SideMemory
from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm.sequences import watched

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact


def parts_of(memory: Memory) -> list[tuple[str, Tensor]]:
    """Name and tensor of each part of a memory."""
    return [(part, getattr(memory, part)) for part in memory.PARTS]


@dataclass(frozen=True)
class MemoryDelta:
    """Memories by module name, sorted, with the manifest that says what they are.

    Raises:
        ValueError: memories and manifest do not speak of the same modules, shapes and entries.
    """

    memories: dict[str, Memory]
    manifest: MemoryManifest

    def __post_init__(self) -> None:
        object.__setattr__(self, "memories", dict(sorted(self.memories.items())))
        described = {name: (site.kind, site.shape, len(site.entries)) for name, site in self.manifest.sites.items()}
        actual = {name: (memory.KIND, memory.shape, memory.count) for name, memory in self.memories.items()}
        if described != actual:
            raise ValueError(f"the manifest describes {described}, the memories are {actual}")
        for name, memory in self.memories.items():
            served = [len(entry) for entry in self.manifest.sites[name].entries]
            if isinstance(memory, SideMemory) and memory.divisible and memory.served != served:
                raise ValueError(f"{name}: the manifest has {served} facts by memory, the marks are of {memory.served}")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], manifest: MemoryManifest) -> MemoryDelta:
        """From what ``tensors`` gave; raises ValueError when that is not what the manifest says."""
        memories = {}
        for name, site in manifest.sites.items():
            kind = KINDS[site.kind]
            memories[name] = kind.of({part: tensors[f"{name}.{part}"] for part in kind.PARTS}, site.settings)
        return cls(memories, manifest)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that they have in a file."""
        return {f"{name}.{part}": t for name, memory in self.memories.items() for part, t in parts_of(memory)}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def count(self) -> int:
        """Entries of all memories."""
        return sum(memory.count for memory in self.memories.values())

    @contextmanager
    def applied(self, lm: LoadedModel) -> Iterator[LoadedModel]:
        """The model with the memories beside it, for the length of a ``with`` block.

        Nothing of the model changes: hooks read what flows through it. What a memory does to a sequence is decided
        where its prompt ends (its last token that is no padding) and kept while the answer is decoded with the
        key-value cache; ``generate`` works as ever. Several tokens behind cached ones are a further piece of the
        prompt, or the next turn, and decided anew; so decode without an assistant model. Without a cache every step
        is a new prompt.

        Raises:
            InputError: a module is missing or has another shape.
            UnsupportedError: in the passes inside, when the attention mask is not (rows, tokens), or the cache was
                filled elsewhere.
        """
        check_fits(self.manifest, lm.model)
        with watched(lm.model) as watcher, beside(lm.model, self.memories, watcher):
            yield lm

    def without(self, ids: Iterable[str]) -> MemoryDelta:
        """This delta without some facts; all other entries are kept bit for bit.

        An entry that serves such facts alone goes. A side memory that serves others too stays, and is not read where
        one of the former is the nearest fact; an entry of a codebook cannot do that.

        Args:
            ids: ids of the facts to let the model say again.

        Raises:
            InputError: some ids are not known here.
            UnsupportedError: an entry of a codebook serves such a fact and others that are to stay.
        """
        gone = self.manifest.hashed(ids)
        shared = {
            fact
            for name, site in self.manifest.sites.items()
            for entry in site.entries
            if gone & set(entry) and not self.memories[name].divisible
            for fact in set(entry) - gone
        }
        if shared:
            raise UnsupportedError(
                f"{self.manifest.method}: {len(gone)} facts to take out share an entry of the memory with "
                f"{len(shared)} facts that are to stay, and cannot be told apart there. Take all of them out, or make "
                "the edit anew without the former."
            )
        memories, sites = {}, {}
        for name, site in self.manifest.sites.items():
            keep = [i for i, entry in enumerate(site.entries) if set(entry) - gone]
            stay = [[k for k, fact in enumerate(site.entries[i]) if fact not in gone] for i in keep]
            if keep:
                memories[name] = self.memories[name].only(keep, stay)
                left = [tuple(site.entries[i][k] for k in own) for i, own in zip(keep, stay, strict=True)]
                sites[name] = _recorded(site, memories[name], left)
        facts = tuple(part.without(gone) for part in self.manifest.facts)
        return MemoryDelta(memories, self.manifest.with_sites(sites, facts=facts))


def make_memory(
    lm: LoadedModel,
    memories: Mapping[str, Memory],
    *,
    method: str,
    hparams: Mapping[str, Any],
    facts: Sequence[Fact],
    entries: Mapping[str, Sequence[Sequence[str]]],
    target_strategy: str,
    seeds: Mapping[str, int],
    retain: Sequence[Fact] = (),
    store_facts: bool = False,
) -> MemoryDelta:
    """A delta for a model, with a complete manifest.

    Args:
        memories: by module name.
        entries: for each module and entry the ids of its facts.
        hparams, facts, target_strategy, seeds, retain, store_facts: as for :func:`build.make_delta`.

    Raises:
        InputError: a module is missing or has another shape.
        NumericalError: a tensor is not finite.
    """
    asked = fact_set(facts, retain=retain, store_text=store_facts)
    sites = {
        name: _recorded(
            BaseSite(**base_site(lm, name), shape=memory.shape),
            memory,
            [tuple(hash_id(fact, asked.salt) for fact in entry) for entry in entries[name]],
        )
        for name, memory in sorted(memories.items())
    }
    manifest = MemoryManifest(
        method=method,
        hparams=dict(hparams),
        base=base_of(lm),
        sites=sites,
        facts=(asked,),
        target_strategy=target_strategy,
        seeds=dict(seeds),
        versions=installed_versions(),
    )
    delta = MemoryDelta(dict(memories), manifest)
    check_finite(delta.tensors())
    check_fits(manifest, lm.model)
    return delta


def compose(first: MemoryDelta, second: MemoryDelta) -> MemoryDelta:
    """One delta that remembers what both do, as if the second's entries had come after the first's.

    Raises:
        InputError: different base models or shapes, or memories of different settings beside one module.
        StaleError: they were made for different weights.
    """
    check_composable(first.manifest, second.manifest, sequential=False)
    memories, sites = dict(first.memories), dict(first.manifest.sites)
    for name, added in second.memories.items():
        site = second.manifest.sites[name]
        if name not in memories:
            memories[name], sites[name] = added, site
            continue
        there: Any = memories[name]
        if there.KIND != added.KIND:
            raise InputError(f"{name}: one delta has a {there.KIND} there, the other a {added.KIND}.")
        try:
            memories[name] = there.joined(added)
        except ValueError as error:
            raise InputError(f"{name}: {error}.") from error
        sites[name] = _recorded(site, memories[name], [*sites[name].entries, *site.entries])
    return MemoryDelta(memories, first.manifest.joined(second.manifest, dict(sorted(sites.items()))))


def _recorded(site: BaseSite, memory: Memory, entries: Sequence[tuple[str, ...]]) -> MemorySite:
    """The record of a module's memory."""
    return MemorySite(
        shape=site.shape,
        transposed=site.transposed,
        base_sha256=site.base_sha256,
        base_dtype=site.base_dtype,
        kind=memory.KIND,
        entries=tuple(entries),
        settings=memory.settings(),
        nbytes=sum(tensor.nbytes for _, tensor in parts_of(memory)),
        operations=memory.operations,
    )
