"""A change to the weights of some linear maps of a model, low-rank first, and what can be done with it in memory.

Orientation is (out, in) throughout: ``dW = left @ right`` adds to the matrix that maps an input x to W x,
whichever way the model stores it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from editunlearn.deltas.arithmetic import merged_weight
from editunlearn.deltas.manifest import BaseManifest, Manifest, SiteRecord, check_composable
from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm.weights import (
    fetch_weight,
    is_offloaded,
    is_transposed,
    module,
    present,
    quantisation,
    read_weight,
    shape,
)


class LoadedModel(Protocol):
    """What this room needs of a loaded model (``editunlearn.lm`` has the real thing)."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...


@dataclass(frozen=True)
class Factors:
    """``dW = left @ right`` of one module.

    Attributes:
        left: (out, r) float32.
        right: (r, in) float32.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(f"factors must be (out, r) and (r, in), not {tuple(left.shape)} and {tuple(right.shape)}")
        if left.dtype != torch.float32 or right.dtype != torch.float32:
            raise ValueError(f"factors must be float32, not {left.dtype} and {right.dtype}")

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of dW."""
        return self.left.shape[0], self.right.shape[1]

    def norm(self) -> float:
        """Frobenius norm of dW, without forming dW: the trace of (L'L)(RR'), in float64."""
        left, right = self.left.double(), self.right.double()
        squared = float(((left.T @ left) * (right @ right.T)).sum())
        return math.sqrt(max(squared, 0.0)) if not math.isnan(squared) else math.nan

    def columns(self, keep: list[int]) -> Factors:
        """The update without all but the given rank columns; those are copied bit for bit."""
        index = torch.tensor(keep, dtype=torch.long, device=self.left.device)
        return Factors(self.left[:, index].contiguous(), self.right[index.to(self.right.device)].contiguous())


@dataclass(frozen=True)
class Dense:
    """dW of one module, every entry of it.

    Attributes:
        left: (out, in) float32, all of dW: there is no ``right`` factor.
    """

    left: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.left.dtype != torch.float32:
            raise ValueError(f"a change must be (out, in) float32, not {tuple(self.left.shape)} {self.left.dtype}")

    @property
    def right(self) -> None:
        """None: ``left`` is dW."""
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of dW."""
        return self.left.shape[0], self.left.shape[1]

    def norm(self) -> float:
        """Frobenius norm of dW, in float64."""
        return frobenius(self.left)


Update = Factors | Dense
F = TypeVar("F", bound=Update)


class WeightDelta(Generic[F]):
    """What deltas have in common that change weights.

    Attributes:
        factors: the change of each module by its name.
    """

    factors: dict[str, F]
    manifest: Any

    def norms(self, lm: LoadedModel | None = None) -> dict[str, float | None]:
        """Relative Frobenius norm of dW by module: norm(dW) / norm(W), without forming dW.

        Args:
            lm: take norm(W) from this model; default: as recorded when the delta was made.

        Returns:
            None for a module whose norm(W) is zero or not known (packed quantised weights).
        """
        if lm is None:
            return {name: site.relative_norm for name, site in self.manifest.sites.items()}
        norms = {name: base_norm(lm.model, name) for name in self.factors}
        return {name: f.norm() / norm if (norm := norms[name]) else None for name, f in self.factors.items()}

    @contextmanager
    def applied(self, lm: LoadedModel, dtype: torch.dtype | None = None) -> Iterator[LoadedModel]:
        """The model with this delta in it, for the length of a ``with`` block; afterwards it is as before,
        bit for bit.

        Each edited module gets a new parameter with the merged weight (float32 sum, one rounding), and its
        own parameter object back at the end, also after an exception; weights that are tied to it do not
        change. A module that is quantised or offloaded keeps its weight and gets the product added to its output.
        Blocks can be nested.

        Args:
            dtype: round merged weights to this dtype on the way (they stay in the weight's dtype), to see
                what storing the model in it would do.

        Raises:
            InputError: a module is missing or has another shape.
        """
        check_fits(self.manifest, lm.model)
        with ExitStack() as undo:
            for name, factors in self.factors.items():
                target = module(lm.model, name)
                if quantisation(lm.model, name) is not None or is_offloaded(target):
                    undo.callback(target.register_forward_hook(_adding(factors)).remove)
                else:
                    undo.callback(_swap_weight, target, target._parameters["weight"])
                    _swap_weight(target, _merged_parameter(lm.model, name, factors, dtype))
            yield lm


@dataclass(frozen=True)
class LowRankDelta(WeightDelta[Factors]):
    """Low-rank updates by module name, sorted, with the manifest that says what they are.

    Raises:
        ValueError: factors and manifest do not speak of the same modules, shapes and ranks.
    """

    factors: dict[str, Factors]
    manifest: Manifest

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", dict(sorted(self.factors.items())))
        described = {name: (site.shape, site.rank) for name, site in self.manifest.sites.items()}
        actual = {name: (factors.shape, factors.rank) for name, factors in self.factors.items()}
        if described != actual:
            raise ValueError(f"the manifest describes {described}, the factors are {actual}")

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 for an empty delta."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(f.left.nbytes + f.right.nbytes for f in self.factors.values())

    def tensors(self) -> dict[str, Tensor]:
        """All factors by the names that they have in a file."""
        sides = {f"{name}.{side}": getattr(f, side) for name, f in self.factors.items() for side in ("left", "right")}
        return sides

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], manifest: Manifest) -> LowRankDelta:
        """From what ``tensors`` gave; raises ValueError when that is not what the manifest says."""
        sites = manifest.sites
        return cls({name: Factors(tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in sites}, manifest)

    @property
    def columns(self) -> dict[str, tuple[str | None, ...]]:
        """By module, the salted hash of each rank column's fact id; None: it serves many facts."""
        return {name: site.columns for name, site in self.manifest.sites.items()}

    def negated(self) -> LowRankDelta:
        """The delta that reverts this one in a model it was merged into, up to the rounding of both."""
        factors = {name: Factors(-f.left, f.right) for name, f in self.factors.items()}
        sites = {name: _changed(site, factors[name], site.columns) for name, site in self.manifest.sites.items()}
        return LowRankDelta(factors, self.manifest.with_sites(sites, negated=not self.manifest.negated))

    def without(self, ids: Iterable[str]) -> LowRankDelta:
        """This delta without the columns of single facts; every other column is kept bit for bit.

        The other columns were solved together with the removed ones, so this is not quite what fitting
        without these facts would give. A module that has no column left is dropped.

        Args:
            ids: ids of the facts to let the model say again.

        Raises:
            InputError: some ids have no column here; the message lists them and how many are known.
        """
        gone = self.manifest.hashed(ids)
        factors: dict[str, Factors] = {}
        sites: dict[str, SiteRecord] = {}
        for name, site in self.manifest.sites.items():
            keep = [i for i, column in enumerate(site.columns) if column not in gone]
            if len(keep) == site.rank:
                factors[name], sites[name] = self.factors[name], site
            elif keep:
                factors[name] = self.factors[name].columns(keep)
                sites[name] = _changed(site, factors[name], tuple(site.columns[i] for i in keep))
        facts = tuple(part.without(gone) for part in self.manifest.facts)
        return LowRankDelta(factors, self.manifest.with_sites(sites, facts=facts))


def compose(first: LowRankDelta, second: LowRankDelta, *, sequential: bool = False) -> LowRankDelta:
    """One delta that does what both do: the ranks of shared modules are concatenated.

    Args:
        sequential: the second was fitted with the first applied, so that its base weights are those of the
            edited model. Without it, both must have been made for the same weights.

    Raises:
        InputError: different base models, shapes, or one of them reverts a merge and the other does not.
        StaleError: not sequential, and a shared module had different weights.
    """
    check_composable(first.manifest, second.manifest, sequential)
    factors = dict(first.factors)
    sites = dict(first.manifest.sites)
    for name, added in second.factors.items():
        site = second.manifest.sites[name]
        if name not in factors:
            factors[name], sites[name] = added, site
            continue
        old = factors[name]
        left = torch.cat([old.left, added.left.to(old.left.device)], dim=1)
        right = torch.cat([old.right, added.right.to(old.right.device)], dim=0)
        factors[name] = Factors(left, right)
        sites[name] = _changed(sites[name], factors[name], sites[name].columns + site.columns)
    return LowRankDelta(factors, first.manifest.joined(second.manifest, dict(sorted(sites.items()))))


def check_fits(manifest: BaseManifest, model: nn.Module) -> None:
    """Makes sure that every edited module is there, in the right shape and with weights.

    Raises:
        InputError: with all problems; UnsupportedError for a weight that is not there.
    """
    problems: list[str] = []
    for name, site in manifest.sites.items():
        try:
            found = shape(model, name)
        except InputError as error:
            problems.extend(error.problems)
            continue
        if found != site.shape:
            problems.append(
                f"{name} is {found[0]} x {found[1]} (out x in) in this model, but the delta changes "
                f"{site.shape[0]} x {site.shape[1]}; it was made for {manifest.base.name}."
            )
        stored_weight(model, name)  # raises when it is offloaded
    if problems:
        raise InputError(problems)


def base_norm(model: nn.Module, name: str) -> float | None:
    """Frobenius norm of a module's weight in float64; None for a packed quantised weight."""
    if quantisation(model, name) is not None:
        return None
    return frobenius(fetch_weight(model, name))


def frobenius(matrix: Tensor) -> float:
    """Frobenius norm in float64, a block of rows at a time."""
    return math.sqrt(math.fsum(float(rows.double().square().sum()) for rows in torch.split(matrix, 1024)))


def stored_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of an edited module: (out, in), or packed as it is when the module is quantised.

    Raises:
        InputError: no such module.
        UnsupportedError: it has no weight that can be read.
    """
    child = module(model, name)
    with present(child):
        packed = (getattr(child, key, None) for key in ("weight", "qweight", "W_q", "weight_packed"))
        found = next((tensor.detach() for tensor in packed if isinstance(tensor, Tensor)), None)
    if quantisation(model, name) is None:
        found = fetch_weight(model, name)
    if found is None:
        raise UnsupportedError(f"{name} ({type(child).__name__}) is quantised in a way that cannot be read.")
    if found.is_meta:
        raise UnsupportedError(f"{name} has no weights: it is on the meta device. Load the model with its weights.")
    return found


@torch.no_grad()
def _merged_parameter(model: nn.Module, name: str, factors: Update, dtype: torch.dtype | None) -> nn.Parameter:
    merged = merged_weight(read_weight(model, name), factors.left, factors.right, dtype)
    stored = merged.t().contiguous() if is_transposed(model, name) else merged
    original = module(model, name)._parameters["weight"]
    return nn.Parameter(stored, requires_grad=original is not None and original.requires_grad)


def _swap_weight(target: nn.Module, weight: nn.Parameter | None) -> None:
    # The slot and not the data: another module may hold the same parameter (tied weights).
    target._parameters["weight"] = weight


def _adding(factors: Update) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(torch.float32)
        inner = functional.linear(x, factors.right.to(x.device)) if factors.right is not None else x
        product = functional.linear(inner, factors.left.to(x.device))
        return (output.to(torch.float32) + product).to(output.dtype)

    return hook


def _changed(site: SiteRecord, factors: Factors, columns: tuple[str | None, ...]) -> SiteRecord:
    """The record of a site whose factors changed: norm anew, gain not measured."""
    values: Mapping[str, Any] = {
        **site.model_dump(),
        "rank": factors.rank,
        "norm": factors.norm(),
        "columns": columns,
        "gain": None,
        "gain_error": None,
        "gain_dtype": None,
    }
    return SiteRecord(**values)
