"""Average indirect effects over facts, by what a token is in its prompt; and how far the estimate agrees with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from editunlearn.evaluation.metrics.intervals import Estimate, estimate
from editunlearn.numerics.ranks import rank_correlation
from editunlearn.tracing.prompts import LAST, ROLES, TracedPrompt

if TYPE_CHECKING:
    from editunlearn.tracing.effects import Effects, Settings


def by_role(prompt: TracedPrompt, effects: Tensor) -> dict[str, Tensor]:
    """Means over the tokens of each role that the prompt has, each (layers,).

    Args:
        effects: (layers, tokens from the subject's first one on).
    """
    columns: dict[str, list[int]] = {}
    for column, token in enumerate(prompt.tokens):
        columns.setdefault(prompt.role(token), []).append(column)
    return {role: effects[:, columns[role]].mean(1) for role in ROLES if role in columns}


def averages(prompts: Sequence[TracedPrompt], effects: Sequence[Tensor]) -> dict[str, list[Estimate]]:
    """For each role the average indirect effect of each block, with the bootstrap interval over facts.

    A fact without tokens of a role (no middle ones in a short subject) does not count there.
    """
    each = [by_role(prompt, of_fact) for prompt, of_fact in zip(prompts, effects, strict=True)]
    found: dict[str, list[Estimate]] = {}
    for role in ROLES:
        values = [of_fact[role] for of_fact in each if role in of_fact]
        if values:
            found[role] = _by_layer(values)
    return found


def _by_layer(values: Sequence[Tensor]) -> list[Estimate]:
    columns = np.stack([value.double().numpy() for value in values], axis=1)
    return [_mean(column.tolist()) for column in columns]


def _mean(values: Sequence[float]) -> Estimate:
    found = estimate(values, share=False)
    assert found is not None  # noqa: S101 - there is a fact
    return found


def agreement(measured: Sequence[Tensor], estimated: Sequence[Tensor]) -> Estimate | None:
    """Mean over facts of the rank correlation of their states' effects with the estimates; None when undefined."""
    found = [
        rank_correlation(one.flatten().tolist(), other.flatten().tolist())
        for one, other in zip(measured, estimated, strict=True)
    ]
    return estimate([value for value in found if value is not None], share=False)


def summary(effects: Sequence[Effects], settings: Settings) -> dict[str, Any]:
    """All averages as JSON: estimates are [mean, low, high, facts], bounds None where one fact has none."""
    prompts = [one.prompt for one in effects]
    kinds: dict[str, Any] = {}
    for kind in settings.kinds:
        estimated = [one.estimated[kind] for one in effects]
        about: dict[str, Any] = {"window": 1 if kind == "block" else settings.window}
        about["estimated"] = _table(averages(prompts, estimated))
        if settings.measured:
            measured = [one.measured[kind] for one in effects]
            found = averages(prompts, measured)
            about["measured"] = _table(found)
            about["peak"] = peak(found)
            about["agreement"] = {
                "per_fact": cell(agreement(measured, estimated)),
                "of_averages": _of_averages(found, averages(prompts, estimated)),
                "of_averages_last_subject_token": _of_averages(
                    {LAST: found[LAST]}, {LAST: averages(prompts, estimated)[LAST]}
                ),
            }
        kinds[kind] = about
    cut = {path: _by_layer([one.severed[path] for one in effects]) for path in settings.paths}
    return {
        "probability": {
            "clean": cell(_mean([one.clean for one in effects])),
            "corrupted": cell(_mean([one.corrupted for one in effects])),
            "total_effect": cell(_mean([one.clean - one.corrupted for one in effects])),
        },
        "kinds": kinds,
        "severed_at_last_subject_token": {path: [cell(one) for one in by_layer] for path, by_layer in cut.items()},
    }


def peak(found: Mapping[str, Sequence[Estimate]]) -> dict[str, Any]:
    """Role and block of the largest average effect."""
    role, layer = max(((role, layer) for role in found for layer in range(len(found[role]))), key=_value(found))
    return {"role": role, "layer": layer, "effect": cell(found[role][layer])}


def _value(found: Mapping[str, Sequence[Estimate]]) -> Any:
    return lambda place: found[place[0]][place[1]].value


def _of_averages(one: Mapping[str, Sequence[Estimate]], other: Mapping[str, Sequence[Estimate]]) -> float | None:
    flat = [[cell_.value for role in one for cell_ in table[role]] for table in (one, other)]
    return rank_correlation(*flat)


def _table(found: Mapping[str, Sequence[Estimate]]) -> dict[str, Any]:
    return {role: [cell(one) for one in by_layer] for role, by_layer in found.items()}


def cell(one: Estimate | None) -> list[float | int | None] | None:
    """[mean, low, high, facts]; JSON has no infinity, so that the bounds of a single fact are None."""
    if one is None:
        return None
    return [one.value, *(bound if np.isfinite(bound) else None for bound in (one.low, one.high)), one.items]
