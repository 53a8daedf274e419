"""What tracing found about a model, kept for ``layers: located``.

It is kept by the fingerprint of the weights, so that it is never used for others, and only by an explicit setting:
``layers: auto`` must not give other deltas because somebody once traced the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from editunlearn.artifacts import atomic_write_json, cached_json
from editunlearn.editors.moments import tokenizer_hash
from editunlearn.errors import InputError
from editunlearn.lm.fingerprint import model_fingerprint
from editunlearn.lm.layers import resolve_layers
from editunlearn.workspace import key_of

if TYPE_CHECKING:
    from types import ModuleType

    from editunlearn.console import Console
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.hparams import MethodHParams
    from editunlearn.lm.loading import LM

Settings = TypeVar("Settings", bound="MethodHParams")


def place(lm: LM, cache: Path) -> Path:
    """File of a model's effects."""
    inputs = {"model": model_fingerprint(lm), "tokenizer": tokenizer_hash(lm), "dtype": str(lm.dtype)}
    return cache / "located" / f"{key_of(inputs)}.json"


def keep(lm: LM, cache: Path, effects: Sequence[float], facts: int) -> None:
    """Keep the average effects of restoring each block's MLP at the last subject token, over so many facts."""
    atomic_write_json(place(lm, cache), {"facts": facts, "effects": list(effects)})


def settled(lm: LM, hp: Settings, cache: Path | None, default: Sequence[int | float]) -> tuple[Settings, str]:
    """``hp`` with block numbers in place of ``layers: located``, and where they come from; others as they are.

    They are the neighbouring blocks, as many as ``default`` names, whose MLPs bring most of the answer back.

    Raises:
        InputError: this model has not been traced, or there is no cache to look into.
    """
    if hp.layers != "located":
        return hp, ""
    there = cached_json(place(lm, cache), dict) if cache is not None else None
    if there is None:
        raise InputError(
            f"layers: located, but {lm.name} with these very weights has not been traced. Run: editunlearn locate "
            f"--model {lm.name}, or set layers to auto."
        )
    count = len(resolve_layers(default, lm.layout.num_layers(lm.model), default)[0])
    found = strongest(there["effects"], count)
    why = f"located: the MLPs of largest effect at the last subject token, over {there['facts']} facts"
    return hp.model_copy(update={"layers": found}), why


def blocks(lm: LM, request: ForgetRequest, hp: MethodHParams, method: ModuleType, console: Console) -> list[int]:
    """Numbers of the blocks that a method edits for a request; they are shown, with where they come from.

    Raises:
        InputError: there are no facts, or a block that the model does not have.
    """
    if not request.facts:
        raise InputError("there are no facts to forget.")
    found, why = resolve_layers(hp.layers, lm.layout.num_layers(lm.model), method.DEFAULT_LAYERS)
    console.info(f"layers: {', '.join(map(str, found))} ({why})")
    return found


def strongest(effects: Sequence[float], count: int) -> list[int]:
    """Numbers of the ``count`` neighbours with the largest sum; the first of equal ones."""
    count = min(count, len(effects))
    starts = range(len(effects) - count + 1)
    first = max(starts, key=lambda start: (sum(effects[start : start + count]), -start))
    return list(range(first, first + count))
