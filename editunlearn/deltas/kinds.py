"""What kinds of delta there are, and what is only for some of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from editunlearn.deltas import dense, lowrank, memory
from editunlearn.deltas.dense import DenseDelta
from editunlearn.deltas.lowrank import LowRankDelta
from editunlearn.deltas.manifest import DenseManifest, Manifest, MemoryManifest
from editunlearn.deltas.memory import MemoryDelta
from editunlearn.deltas.remembering import KINDS as MEMORIES
from editunlearn.errors import UnsupportedError

Delta = LowRankDelta | DenseDelta | MemoryDelta
"""Every kind has a ``manifest``, ``nbytes``, ``tensors()``, ``applied(lm)``, ``without(ids)`` and ``of(tensors,
manifest)``."""

AnyManifest = Manifest | DenseManifest | MemoryManifest
KINDS: Mapping[str, type[Manifest] | type[DenseManifest] | type[MemoryManifest]] = MappingProxyType(
    {"low_rank": Manifest, "dense": DenseManifest, "memory": MemoryManifest}
)


def tensor_names(manifest: AnyManifest) -> set[str]:
    """Names of the tensors in the file of the delta that a manifest describes."""
    if isinstance(manifest, MemoryManifest):
        return {f"{name}.{part}" for name, site in manifest.sites.items() for part in MEMORIES[site.kind].PARTS}
    sides = ("change",) if isinstance(manifest, DenseManifest) else ("left", "right")
    return {f"{name}.{side}" for name in manifest.sites for side in sides}


def delta_of(tensors: Mapping[str, Tensor], manifest: AnyManifest) -> Delta:
    """The delta that a manifest describes.

    Raises:
        ValueError: the tensors are not what the manifest says.
    """
    if isinstance(manifest, MemoryManifest):
        return MemoryDelta.of(tensors, manifest)
    if isinstance(manifest, DenseManifest):
        return DenseDelta.of(tensors, manifest)
    return LowRankDelta.of(tensors, manifest)


def written(delta: Delta, what: str) -> LowRankDelta | DenseDelta:
    """``delta``, if it is a change of weights.

    Raises:
        UnsupportedError: it is a memory, for which ``what`` has no meaning.
    """
    if not isinstance(delta, MemoryDelta):
        return delta
    raise UnsupportedError(
        f"{what}: {delta.manifest.method} leaves the weights as they are and keeps a memory beside them; there is no "
        "change of weights. Use the delta itself (applied(lm), evaluate --delta), or export --to standalone, or a "
        "method that writes into the weights, such as memit."
    )


def compose(first: Delta, second: Delta, *, sequential: bool = False) -> Delta:
    """One delta that does what both do; see ``compose`` of :mod:`lowrank`, :mod:`dense`, :mod:`memory`.

    Raises:
        InputError: they are for different models. UnsupportedError: of different kinds.
    """
    if isinstance(first, LowRankDelta) and isinstance(second, LowRankDelta):
        return lowrank.compose(first, second, sequential=sequential)
    if isinstance(first, MemoryDelta) and isinstance(second, MemoryDelta):
        return memory.compose(first, second)
    if not isinstance(first, MemoryDelta) and not isinstance(second, MemoryDelta):
        return dense.compose(first, second, sequential=sequential)
    raise UnsupportedError(
        f"{first.manifest.method} and {second.manifest.method}: a memory and a change of weights cannot be one delta. "
        "Merge the change of weights, and make the memory on the merged model."
    )
