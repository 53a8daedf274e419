"""How much of an edit survives when the edited weight is rounded to the dtype that the model is stored in.

A weight on the bfloat16 grid does not move when the change is under half a step, so a small dW is weakened on
the way in. Measured here, at merge time, for every module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editunlearn.deltas.arithmetic import dtype_name, merged_rows
from editunlearn.deltas.lowrank import LoadedModel, Update, WeightDelta
from editunlearn.errors import NumericalError
from editunlearn.lm.weights import fetch_weight, quantisation

LEAST_GAIN = 0.98


@dataclass(frozen=True)
class Gain:
    """What rounding left of one module's dW.

    Attributes:
        gain: <merged - W, dW> / norm(dW)^2: 1 when all of dW arrived, 0 when none of it did.
        error: norm(merged - W - dW) / norm(dW).
        norm: norm(dW) / norm(W); None when W is zero.
        dtype: what the merged weight was rounded to.
    """

    gain: float
    error: float
    norm: float | None
    dtype: str


@torch.no_grad()
def realised_gain(weight: Tensor, factors: Update, dtype: torch.dtype) -> Gain:
    """Gain and error of one module, accumulated in float64 over blocks of rows.

    A dW that is exactly zero has gain 1 and error 0: there was nothing to lose.

    Args:
        weight: (out, in), the unedited weight.
        factors: the update.
        dtype: the dtype that the merged weight is stored in.

    Raises:
        NumericalError: the weight, the update or the rounded sum is not finite.
    """
    along = squared = missed = total = 0.0
    for rows in merged_rows(weight, factors.left, factors.right, dtype):
        update, base = rows.update.double(), rows.base.double()
        arrived = rows.merged.double() - base
        along += float((arrived * update).sum())
        squared += float(update.square().sum())
        missed += float((arrived - update).square().sum())
        total += float(base.square().sum())
    if not all(math.isfinite(number) for number in (along, squared, missed, total)):
        raise NumericalError(
            f"the edited weight has values that are not finite in {dtype_name(dtype)}; nothing was written."
        )
    relative = math.sqrt(squared / total) if total else None
    if squared == 0.0:
        return Gain(1.0, 0.0, relative, dtype_name(dtype))
    return Gain(along / squared, math.sqrt(missed / squared), relative, dtype_name(dtype))


def measure(lm: LoadedModel, delta: WeightDelta[Any], dtype: torch.dtype | None = None) -> dict[str, Gain]:
    """Realised gain by module; quantised modules are left out, as nothing is merged into them.

    Args:
        dtype: what the merged model is stored in; default: each weight's own dtype.

    Raises:
        NumericalError: names the first module whose merged weight is not finite.
    """
    report: dict[str, Gain] = {}
    for name, factors in delta.factors.items():
        if quantisation(lm.model, name) is not None:
            continue
        weight = fetch_weight(lm.model, name)
        try:
            report[name] = realised_gain(weight, factors, dtype or weight.dtype)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
    return report


def gain_warnings(report: Mapping[str, Gain]) -> list[str]:
    """One line, with the way out, for each module that lost more than 2% of its edit."""
    lines = []
    for name, found in report.items():
        if found.gain < LEAST_GAIN:
            size = "" if found.norm is None else f" (norm(dW) is {found.norm:.2%} of norm(W))"
            lines.append(
                f"{name}: the edit reached {found.gain:.0%} of its intended effect after rounding to "
                f"{found.dtype}{size}. Keep the delta as a LoRA (--save lora), or save that layer in float32."
            )
    return lines
