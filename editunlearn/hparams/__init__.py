"""Settings of the methods: strict schemas, and the one function that loads them.

A schema is a frozen pydantic model that knows no unknown keys. The shared pieces are in this package; each method
has its own ``HParams`` in ``editunlearn/editors/<method>.py``. Precedence: schema defaults < file <
``overrides[model_type]`` < ``--set a.b=c``. There is no model, path, device or dtype of a model in any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from editunlearn.hparams.fields import Piece, Real, Whole
from editunlearn.hparams.methods import (
    BlockHParams,
    EditorHParams,
    Located,
    MemoryHParams,
    MethodHParams,
    UnlearnerHParams,
    Valued,
)
from editunlearn.hparams.pieces import (
    ChangeLimits,
    Chunks,
    ContextPrefixes,
    EditLimits,
    Limits,
    Merge,
    Moments,
    NullSpace,
    Refine,
    Retain,
    Value,
)
from editunlearn.hparams.training import Keeping, Stop, Train

__all__ = [
    "ChangeLimits",
    "Keeping",
    "Stop",
    "Train",
    "UnlearnerHParams",
    "BlockHParams",
    "Chunks",
    "ContextPrefixes",
    "EditorHParams",
    "EditLimits",
    "Limits",
    "Located",
    "MemoryHParams",
    "Merge",
    "MethodHParams",
    "Moments",
    "NullSpace",
    "Piece",
    "Real",
    "Refine",
    "Retain",
    "Value",
    "Valued",
    "Whole",
    "Described",
    "as_settled",
    "describe",
    "load_hparams",
    "resolved",
]


class Described(NamedTuple):
    """One setting for documents and headers."""

    key: str
    value: Any
    is_default: bool
    description: str


def load_hparams(
    source: str | Path | Mapping[str, Any],
    *,
    set: Sequence[str] = (),  # the name of the flag
    model_type: str | None = None,
    format: Literal["editunlearn", "easyedit"] = "editunlearn",
) -> MethodHParams:
    """Read and check settings; nothing but the schema's own defaults is ever filled in.

    Args:
        source: an existing file first, else the name of a shipped one (``memit``, ``memit.yaml``,
            ``paper/memit``), or the mapping itself.
        set: ``a.b=c`` each, the value in YAML, the last one wins.
        model_type: ``config.model_type`` of the model, picks from the file's ``overrides``.
        format: ``easyedit`` also reads ROME's, MEMIT's and AlphaEdit's files; ``hparams.easyedit.read``
            gives the translation to show.

    Raises:
        InputError: every problem found, one a line, each with file and line, what is allowed and a near name.
    """
    from editunlearn.hparams import check, documents, easyedit

    if format not in ("editunlearn", "easyedit"):
        from editunlearn.errors import InputError

        raise InputError(f"hparams format {format!r} is not known. Formats: editunlearn, easyedit.")
    document = documents.read(source)
    if format == "easyedit":
        document = easyedit.translate(document).document
    return check.check(document, set, model_type)


def resolved(hp: BaseModel) -> dict[str, Any]:
    """All settings with their values, plain and JSON-able; ``load_hparams`` reads it back."""
    return hp.model_dump(mode="json")


def as_settled(asked: Mapping[str, Any], settled: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings with the numbers that a run found for ``batch_tokens: auto``, so that the two can be compared."""
    made = dict(asked)
    for key, value in asked.items():
        there = settled.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            made[key] = as_settled(value, there)
        elif key == "batch_tokens" and value == "auto" and there is not None:
            made[key] = there
    return made


def describe(hp: MethodHParams) -> list[Described]:
    """Every setting: dotted key, value, is it the schema's default, description with the range."""
    return list(_describe(hp, None, ""))


def _describe(part: BaseModel, default_part: BaseModel | None, prefix: str) -> list[Described]:
    from editunlearn.hparams.check import allowed

    rows: list[Described] = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        default = getattr(default_part, name) if default_part else field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            rows += _describe(value, default if isinstance(default, BaseModel) else None, f"{prefix}{name}.")
        else:
            rows.append(
                Described(prefix + name, value, value == default, f"{field.description} Allowed: {allowed(field)}.")
            )
    return rows
