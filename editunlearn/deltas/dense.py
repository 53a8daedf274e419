"""A delta of weights that training changed: all entries of some matrices, learned for all facts together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editunlearn.deltas.build import base_of, base_site, check_finite, with_gain
from editunlearn.deltas.lowrank import Dense, LoadedModel, LowRankDelta, Update, WeightDelta, base_norm, check_fits
from editunlearn.deltas.manifest import (
    DenseManifest,
    DenseSite,
    WeightSite,
    check_composable,
    fact_set,
    installed_versions,
)
from editunlearn.errors import UnsupportedError

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact


@dataclass(frozen=True)
class DenseDelta(WeightDelta[Dense]):
    """Changes by module name, sorted, with the manifest that says what they are.

    Raises:
        ValueError: changes and manifest do not speak of the same modules and shapes.
    """

    factors: dict[str, Dense]
    manifest: DenseManifest

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", dict(sorted(self.factors.items())))
        described = {name: site.shape for name, site in self.manifest.sites.items()}
        actual = {name: change.shape for name, change in self.factors.items()}
        if described != actual:
            raise ValueError(f"the manifest describes {described}, the changes are {actual}")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], manifest: DenseManifest) -> DenseDelta:
        """From what ``tensors`` gave; raises ValueError when that is not what the manifest says."""
        return cls({name: Dense(tensors[f"{name}.change"]) for name in manifest.sites}, manifest)

    def tensors(self) -> dict[str, Tensor]:
        """All changes by the names that they have in a file."""
        return {f"{name}.change": change.left for name, change in self.factors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all changes."""
        return sum(change.left.nbytes for change in self.factors.values())

    @property
    def count(self) -> int:
        """Entries of weights that change."""
        return sum(site.changed for site in self.manifest.sites.values())

    def negated(self) -> DenseDelta:
        """The delta that reverts this one in a model it was merged into, up to the rounding of both."""
        return scaled(self, -1.0, negated=not self.manifest.negated)

    def without(self, ids: Iterable[str]) -> DenseDelta:
        """There is no part of a dense change that is one fact's own.

        Raises:
            UnsupportedError: always, if there are ids.
        """
        gone = list(ids)
        if gone:
            raise UnsupportedError(
                f"{self.manifest.method}: all {self.manifest.fact_count} facts were learned together in the same "
                f"weights, so that {', '.join(map(repr, gone))} cannot be taken out alone. Make the delta anew without "
                "them, or use an editor, which keeps a column for each fact."
            )
        return self


def make_dense(
    lm: LoadedModel,
    changes: Mapping[str, Dense],
    *,
    method: str,
    hparams: Mapping[str, Any],
    facts: Sequence[Fact],
    target_strategy: str,
    seeds: Mapping[str, int],
    retain: Sequence[Fact] = (),
    store_facts: bool = False,
) -> DenseDelta:
    """A delta for a model that is still as it came, with a complete manifest; the realised gain is measured.

    Args:
        changes: by module name.
        hparams, facts, target_strategy, seeds, retain, store_facts: as for :func:`build.make_delta`.

    Raises:
        InputError: a module is missing or has another shape.
        NumericalError: a change, or the merged weight, is not finite.
    """
    check_finite({name: change.left for name, change in changes.items()})
    manifest = DenseManifest(
        method=method,
        hparams=dict(hparams),
        base=base_of(lm),
        sites={name: _site(lm, name, change) for name, change in sorted(changes.items())},
        facts=(fact_set(facts, retain=retain, store_text=store_facts),),
        target_strategy=target_strategy,
        seeds=dict(seeds),
        versions=installed_versions(),
    )
    check_fits(manifest, lm.model)
    return with_gain(lm, DenseDelta(dict(changes), manifest))


def _site(lm: LoadedModel, name: str, change: Dense) -> DenseSite:
    return DenseSite(
        **base_site(lm, name),
        shape=change.shape,
        base_norm=base_norm(lm.model, name),
        norm=change.norm(),
        changed=int(change.left.count_nonzero()),
    )


def _recorded(site: WeightSite, change: Dense) -> DenseSite:
    """The record of a site whose change is another one: norm anew, gain not measured."""
    kept = {key: getattr(site, key) for key in ("shape", "transposed", "base_sha256", "base_dtype", "base_norm")}
    return DenseSite(**kept, norm=change.norm(), changed=int(change.left.count_nonzero()))


def scaled(delta: DenseDelta, factor: float, **changes: Any) -> DenseDelta:
    """``factor`` times the change; ``changes`` go to the manifest."""
    factors = {name: Dense(factor * change.left) for name, change in delta.factors.items()}
    sites = {name: _recorded(site, factors[name]) for name, site in delta.manifest.sites.items()}
    return DenseDelta(factors, delta.manifest.with_sites(sites, **changes))


def whole(update: Update) -> Tensor:
    """dW (out, in) of one module."""
    return update.left @ update.right if update.right is not None else update.left


@torch.no_grad()
def compose(
    first: LowRankDelta | DenseDelta, second: LowRankDelta | DenseDelta, *, sequential: bool = False
) -> DenseDelta:
    """One delta that does what both do, at least one of them dense: the sum of the changes.

    Args:
        sequential: the second was made with the first applied; see :func:`lowrank.compose`.

    Raises:
        InputError, StaleError: as for :func:`lowrank.compose`.
    """
    check_composable(first.manifest, second.manifest, sequential)
    factors: dict[str, Dense] = {}
    sites: dict[str, DenseSite] = {}
    for part in (first, second):
        for name, update in part.factors.items():
            there = factors.get(name)
            factors[name] = Dense(there.left + whole(update) if there is not None else whole(update))
            sites[name] = _recorded(sites.get(name, part.manifest.sites[name]), factors[name])
    joined = first.manifest.joined(second.manifest, {})
    fields = {key: getattr(joined, key) for key in type(joined).model_fields if key not in ("kind", "sites")}
    return DenseDelta(factors, DenseManifest(**fields, sites=dict(sorted(sites.items()))))
