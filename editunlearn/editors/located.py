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
    from editunlearn.hparams import EditorHParams, MethodHParams
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
    found, facts = traced(lm, cache, default)
    if not found:
        raise InputError(
            f"layers: located, but {lm.name} with these very weights has not been traced. Run: editunlearn locate "
            f"--model {lm.name}, or set layers to auto."
        )
    why = f"located: the MLPs of largest effect at the last subject token, over {facts} facts"
    return hp.model_copy(update={"layers": found}), why


def traced(lm: LM, cache: Path | None, default: Sequence[int | float]) -> tuple[list[int], int]:
    """Blocks that tracing would choose, as many as ``default`` names, and over how many facts; none if these weights
    have not been traced."""
    there = cached_json(place(lm, cache), dict) if cache is not None else None
    if there is None:
        return [], 0
    return strongest(there["effects"], len(_by_depth(lm, default))), there["facts"]


def remark(lm: LM, hp: EditorHParams, cache: Path) -> str:
    """What somebody who leaves ``layers: auto`` should know of an earlier tracing; empty if there is nothing."""
    from editunlearn import editors

    default = editors.module(hp.method).DEFAULT_LAYERS
    found, facts = traced(lm, cache, default) if hp.layers == "auto" else ([], 0)
    if not found or found == _by_depth(lm, default):
        return ""
    return f"layers: auto goes by depth; tracing {facts} facts spoke for {found} (--set layers=located)"


def _by_depth(lm: LM, default: Sequence[int | float]) -> list[int]:
    return resolve_layers(default, lm.layout.num_layers(lm.model), default)[0]


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
