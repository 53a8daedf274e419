"""Kinds of values in settings: what is read as a number, a count or a list of layers, and the base of every schema."""

from __future__ import annotations

import re
from math import inf
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, Strict

# Numbers that PyYAML (YAML 1.1) leaves as text although everybody else reads floats: 5e-1, 1e-3, 1.5e4.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _layers(value: Any) -> Any:
    """Only one meaning per list: block numbers (ints) or depths (floats), each list in ascending order."""
    if value in ("auto", "located"):
        return value
    layers = [_number(layer) for layer in value] if isinstance(value, list | tuple) else []
    if layers and all(type(layer) is int and layer >= 0 for layer in layers):
        kind = "block numbers"
    elif layers and all(type(layer) is float and 0.0 <= layer <= 1.0 for layer in layers):
        kind = "depths"
    else:
        raise ValueError(
            f"layers is {value!r}; it must be auto, located, or block numbers such as [4, 5, 6], "
            "or depths from 0.0 to 1.0 such as [0.3, 0.5], not both in one list."
        )
    if any(later <= earlier for earlier, later in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"layers is {value!r}; {kind} must be in ascending order, each once.")
    return layers


def _count(name: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be auto, or a whole number of at least 1.")
        return value

    return BeforeValidator(check)


def _strength(value: Any) -> Any:
    number = _number(value)
    if number != "auto" and (isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < inf):
        raise ValueError(f"refine.kl is {value!r}; it must be auto, or a number from 0.")
    return number if number == "auto" else float(number)


Real = Annotated[float, Strict(), AllowInfNan(False), BeforeValidator(_number)]
Whole = Annotated[int, Strict()]
_COUNT = Field(json_schema_extra={"allowed": "auto, or a whole number of at least 1"})
Steps = Annotated[Literal["auto"] | int, _count("refine.steps"), _COUNT]
Prompts = Annotated[Literal["auto"] | int, _count("refine.retain_batch"), _COUNT]
Strength = Annotated[
    Literal["auto"] | float,
    BeforeValidator(_strength),
    Field(json_schema_extra={"allowed": "auto, or a number from 0"}),
]
Spellings = Annotated[
    list[Literal["lower", "upper", "hyphens", "quotes"]],
    Field(json_schema_extra={"allowed": "a list of lower, upper, hyphens and quotes, or an empty one"}),
]
BatchTokens = Annotated[Literal["auto"] | int, _count("batch_tokens"), _COUNT]
Tokens = Annotated[Literal["auto"] | int, _count("moments.tokens"), _COUNT]
Layers = Annotated[
    Literal["auto", "located"] | list[int | float],
    BeforeValidator(_layers),
    Field(
        json_schema_extra={"allowed": "auto, located, or a list of block numbers, or a list of depths from 0.0 to 1.0"}
    ),
]


class Piece(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
