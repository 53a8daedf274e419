"""From the factors that a method computed to a delta with a complete manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from editunlearn.deltas.arithmetic import dtype_name, weight_sha256
from editunlearn.deltas.gain import measure
from editunlearn.deltas.lowrank import (
    Factors,
    LoadedModel,
    LowRankDelta,
    WeightDelta,
    base_norm,
    check_fits,
    stored_weight,
)
from editunlearn.deltas.manifest import (
    BaseModelRecord,
    Manifest,
    SiteRecord,
    fact_set,
    hash_columns,
    installed_versions,
)
from editunlearn.errors import NumericalError
from editunlearn.hparams import resolved
from editunlearn.lm.weights import is_transposed

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact, ForgetRequest
    from editunlearn.hparams import MethodHParams

Columns = Sequence[str | None]
W = TypeVar("W", bound=WeightDelta[Any])


def make_delta(
    lm: LoadedModel,
    factors: Mapping[str, Factors],
    *,
    method: str,
    hparams: Mapping[str, Any],
    facts: Sequence[Fact],
    columns: Columns | Mapping[str, Columns],
    target_strategy: str,
    seeds: Mapping[str, int],
    retain: Sequence[Fact] = (),
    past: str = "",
    store_facts: bool = False,
    dtype: torch.dtype | None = None,
) -> LowRankDelta:
    """A delta for a model that is still unedited: hashes its weights, measures norms and the realised gain.

    Args:
        factors: by module name; left (out, r) and right (r, in), float32.
        hparams: resolved settings as plain JSON values.
        facts: what was asked to be forgotten.
        columns: for each rank column the id of its fact, None where it serves many. One list for all modules,
            or one for each.
        seeds: every seed by purpose, for example ``{"seed": 0}``.
        retain: the user's facts to keep; they and ``past``, the hash of earlier edits' keys, are recorded as a hash.
        store_facts: keep the text of the facts in the manifest.
        dtype: what the merged model will be stored in; default: as loaded.

    Raises:
        InputError: a module is missing or has another shape.
        NumericalError: a factor, or the merged weight, is not finite.
        ValueError: column ids that are not ids of ``facts``, or not one a column.
    """
    check_finite({f"{n}.{side}": getattr(f, side) for n, f in factors.items() for side in ("left", "right")})
    factors = {name: Factors(f.left.detach(), f.right.detach()) for name, f in sorted(factors.items())}
    asked = fact_set(facts, retain=retain, past=past, store_text=store_facts)
    hashed = hash_columns(columns, list(factors), asked.salt)
    strangers = {column for row in hashed.values() for column in row if column is not None} - set(asked.ids)
    if strangers:
        raise ValueError(f"{len(strangers)} column ids are not ids of the {len(facts)} facts")
    manifest = Manifest(
        method=method,
        hparams=dict(hparams),
        base=base_of(lm),
        sites={name: _site(lm, name, f, hashed[name]) for name, f in factors.items()},
        facts=(asked,),
        target_strategy=target_strategy,
        seeds=dict(seeds),
        versions=installed_versions(),
    )
    return with_gain(lm, LowRankDelta(factors, manifest), dtype)


def what_was_asked(
    request: ForgetRequest, hp: MethodHParams, target_strategy: str, *, store_facts: bool = False
) -> dict[str, Any]:
    """What a manifest says of a request and the settings that it was met with, for :func:`make_delta` and its like.

    Args:
        target_strategy: how the facts came to their targets.
        store_facts: keep their text in the manifest.
    """
    return {
        "method": hp.method,
        "hparams": resolved(hp),
        "facts": request.facts,
        "target_strategy": target_strategy,
        "seeds": {"seed": hp.seed},
        "retain": request.retain,
        "store_facts": store_facts,
    }


def with_gain(lm: LoadedModel, delta: W, dtype: torch.dtype | None = None) -> W:
    """The same delta with the realised gain measured anew on the unedited model, in its manifest."""
    check_fits(delta.manifest, lm.model)
    sites = dict(delta.manifest.sites)
    for name, found in measure(lm, delta, dtype).items():
        sites[name] = sites[name].model_copy(
            update={"gain": found.gain, "gain_error": found.error, "gain_dtype": found.dtype}
        )
    return type(delta)(delta.factors, delta.manifest.with_sites(sites))  # type: ignore[call-arg]


def check_norm(delta: WeightDelta[Any], limit: float | None) -> None:
    """Raises NumericalError when some change is larger, relative to its weight, than ``limit``; None: no limit."""
    norms = {name: norm for name, norm in delta.norms().items() if norm is not None}
    if limit is None or not norms or max(norms.values()) <= limit:
        return
    name = max(norms, key=lambda site: norms[site])
    raise NumericalError(
        f"{name}: the change of {delta.manifest.fact_count} facts is {norms[name]:.3g} times as large as the weight, "
        f"above limits.norm ({limit:g}): such a model is ruined. Nothing was written. Ask for fewer facts, raise "
        "moments.weight, lower value.clamp or train.lr, or --set limits.norm=null."
    )


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises NumericalError that names every tensor with a value that is not finite."""
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NumericalError(
            f"factors with values that are not finite: {', '.join(bad)}. Nothing was written. Lower the step "
            "size or the number of facts, or raise the ridge."
        )


def base_of(lm: LoadedModel) -> BaseModelRecord:
    """The model that a delta is made for."""
    config: Any = lm.model.config
    chat = getattr(lm, "chat", None)
    how = chat.record() if chat is not None else None
    return BaseModelRecord(name=lm.name, revision=lm.revision, model_type=config.model_type, chat=how)


def base_site(lm: LoadedModel, name: str) -> dict[str, Any]:
    """What is recorded of a module whatever is done to it, but for its shape."""
    weight = stored_weight(lm.model, name)
    return {
        "transposed": is_transposed(lm.model, name),
        "base_sha256": weight_sha256(weight),
        "base_dtype": dtype_name(weight.dtype),
    }


def _site(lm: LoadedModel, name: str, factors: Factors, columns: tuple[str | None, ...]) -> SiteRecord:
    return SiteRecord(
        **base_site(lm, name),
        shape=factors.shape,
        rank=factors.rank,
        base_norm=base_norm(lm.model, name),
        norm=factors.norm(),
        columns=columns,
    )
