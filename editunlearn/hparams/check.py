"""From a parsed document to checked settings: overrides and ``--set`` laid over it, one report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from editunlearn import methods
from editunlearn.errors import InputError
from editunlearn.hparams.documents import Document, Keys, parse_set, place_of
from editunlearn.hparams.methods import MethodHParams
from editunlearn.naming import did_you_mean, nearest

OVERRIDES = "overrides"


def check(document: Document, settings: Sequence[str], model_type: str | None) -> MethodHParams:
    """Lay ``overrides[model_type]`` and ``--set`` over a document and validate the result.

    The overrides of other model types are checked as well: a mistake there should not wait for that model.

    Raises:
        InputError: every problem found.
    """
    problems: list[str] = []
    data = _plain(document.data)
    overrides = _overrides(document, data.pop(OVERRIDES, {}), problems)
    patches = _patches([settings] if isinstance(settings, str) else settings, problems)

    def merged(kind: str | None) -> tuple[dict[str, Any], dict[Keys, str]]:
        tree, places = _plain(data), dict(document.places)
        if kind is not None and kind in overrides:
            label = f"(overrides.{kind})"
            _overlay(
                tree,
                overrides[kind],
                places,
                lambda path: f"{document.place((OVERRIDES, kind, *path))} {label}",
            )
        for item, patch in patches:
            _overlay(tree, patch, places, lambda path, item=item: f"--set {item}")  # type: ignore[misc]
        return tree, places

    tree, places = merged(model_type)
    schema = _schema(tree, places, document.name, problems)
    if schema is not None:
        for kind in (model_type, *overrides):
            found, _ = _validate(schema, *merged(kind), document.name)
            problems += found
    if schema is None or problems:
        raise InputError(dict.fromkeys(problems))
    found, hp = _validate(schema, tree, places, document.name)
    if hp is None:  # cannot differ from the pass above; kept for the type
        raise InputError(found)
    return hp


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words: ``a number above 0, or null``."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: Iterable[Any]) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _allowed(inner, [*metadata, *more])
    if origin is Literal:
        names = [str(choice) for choice in get_args(annotation)]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if origin in (Union, UnionType):
        return ", or ".join(_allowed(part, metadata) for part in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with keys {', '.join(annotation.model_fields)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    name = words.get(annotation, str(annotation))
    return name + _bounds(metadata) if annotation in (int, float) else name


def _bounds(metadata: Iterable[Any]) -> str:
    found: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            found.append(_bounds(item.metadata))
        elif isinstance(item, annotated_types.Gt):
            found.append(f" above {item.gt}")
        elif isinstance(item, annotated_types.Ge):
            found.append(f", at least {item.ge}")
    return "".join(found)


def _overrides(document: Document, raw: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    """The usable overrides by model type; what is wrong with the others goes to ``problems``."""
    if not isinstance(raw, Mapping):
        place = document.place((OVERRIDES,))
        problems.append(f"{place}: overrides is {_shown(raw)}; it must map a model type (llama, gpt2) to settings.")
        return {}
    usable: dict[str, dict[str, Any]] = {}
    for kind, patch in raw.items():
        place = document.place((OVERRIDES, kind))
        if not isinstance(patch, Mapping):
            problems.append(f"{place}: overrides.{kind} is {_shown(patch)}; it must be a mapping of settings.")
        elif "method" in patch:
            place = document.place((OVERRIDES, kind, "method"))
            problems.append(f"{place}: overrides.{kind}.method: one file is for one method. Remove it.")
        else:
            usable[kind] = dict(patch)
    return usable


def _patches(settings: Sequence[str], problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Each ``--set`` as (its text, nested mapping)."""
    patches: list[tuple[str, dict[str, Any]]] = []
    for item in settings:
        try:
            path, value = parse_set(item)
        except InputError as error:
            problems += error.problems
            continue
        if path[0] == OVERRIDES:
            problems.append(f"--set {item!r}: overrides is for files. Set the key itself, for example value.lr=0.1.")
            continue
        for part in reversed(path):
            value = {part: value}
        patches.append((item, value))
    return patches


def _overlay(
    tree: dict[str, Any],
    patch: Mapping[str, Any],
    places: dict[Keys, str],
    place: Callable[[Keys], str],
    path: Keys = (),
) -> None:
    """Merge ``patch`` into ``tree`` in place, mapping by mapping, and note where each value is from."""
    for key, value in patch.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
                places[here] = place(here)
            _overlay(tree[key], value, places, place, here)
        else:
            tree[key] = _plain(value)
            places[here] = place(here)


def _plain(value: Any) -> Any:
    """A copy in which two uses of one YAML anchor no longer share an object."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _schema(
    tree: Mapping[str, Any], places: Mapping[Keys, str], name: str, problems: list[str]
) -> type[MethodHParams] | None:
    if "method" not in tree:
        problems.append(f"{name}: no 'method'. Add 'method: NAME'; methods: {', '.join(methods.names())}.")
        return None
    try:
        return methods.schema(tree["method"])
    except InputError as error:
        problems += [f"{place_of(places, ('method',), name)}: {problem}" for problem in error.problems]
        return None


def _validate(
    schema: type[MethodHParams], tree: Mapping[str, Any], places: Mapping[Keys, str], name: str
) -> tuple[list[str], MethodHParams | None]:
    try:
        return [], schema.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        return [f"{place_of(places, item['loc'], name)}: {_message(schema, item)}" for item in found], None


def _message(schema: type[BaseModel], item: Any) -> str:
    """One pydantic error in our words: the key, the value, what is allowed."""
    path: Keys = item["loc"]
    dotted = ".".join(map(str, path))
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])  # our own validators write whole messages
    if item["type"] == "extra_forbidden":
        return _unknown_key(schema, path)
    field = _field(schema, path)
    if field is None:
        return f"{dotted}: {item['msg']}."
    return f"{dotted} is {_shown(item['input'])}; it must be {allowed(field)}. {field.description}"


def _unknown_key(schema: type[BaseModel], path: Keys) -> str:
    parent = _piece(schema, path[:-1])
    siblings = list(parent.model_fields) if parent else []
    if len(path) == 1:
        siblings.append(OVERRIDES)
    dotted = ".".join(map(str, path))
    prefix = "".join(f"{part}." for part in path[:-1])
    near = nearest(str(path[-1]), siblings)
    # A key in the wrong section is as common as a misspelt one.
    elsewhere = [key for key in _dotted_keys(schema) if key.rsplit(".", 1)[-1] == path[-1]]
    if near is not None:
        hint = f" Did you mean {prefix + near!r}?"
    else:
        hint = f" Did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(dotted, _dotted_keys(schema))
    owner = f"Keys of {prefix[:-1]}" if prefix else "Keys"
    return f"unknown key {dotted!r}.{hint} {owner}: {', '.join(siblings)}."


def _dotted_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in schema.model_fields:
        keys.append(prefix + name)
        piece = _piece(schema, (name,))
        keys += _dotted_keys(piece, f"{prefix}{name}.") if piece else []
    return keys


def _field(schema: type[BaseModel], path: Keys) -> FieldInfo | None:
    parent = _piece(schema, path[:-1])
    return parent.model_fields.get(str(path[-1])) if parent and path else None


def _piece(schema: type[BaseModel], path: Keys) -> type[BaseModel] | None:
    """The schema that a key path leads to, if it is one (``X | None`` counts as X)."""
    for part in path:
        field = schema.model_fields.get(str(part))
        annotation = field.annotation if field else None
        options = [annotation, *get_args(annotation)]
        pieces = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not pieces:
            return None
        schema = pieces[0]
    return schema


def _shown(value: Any) -> str:
    """A value as it would stand in the file, cut to a readable length."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = f"a number of {value.bit_length() if isinstance(value, int) else 'many'} bits"
    return text if len(text) <= 80 else text[:77] + "..."
