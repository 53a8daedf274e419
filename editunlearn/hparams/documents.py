"""Hparams files as text: where they are, what they say, and on which line.

YAML (and so JSON) is read with line numbers. A key that occurs twice, a key that is not text, several
documents or an alias that contains itself are errors: PyYAML alone would let the last value win silently or
never come back.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from editunlearn.errors import InputError
from editunlearn.naming import did_you_mean
from editunlearn.resources import shipped_names, shipped_path

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed file: the name to show, the mapping, and the place (``file:line``) of each key path."""

    name: str
    data: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)

    def place(self, path: Keys) -> str:
        """Place of a key path, or of the nearest enclosing one that has a place, or the file's name."""
        return place_of(self.places, path, self.name)


def place_of(places: Mapping[Keys, str], path: Keys, fallback: str) -> str:
    """The place recorded for the longest beginning of ``path``."""
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return places[path[:end]]
    return fallback


def read(source: str | Path | Mapping[str, Any]) -> Document:
    """Read a mapping, an existing file, or a shipped file by name.

    Raises:
        InputError: no such file (with near names), or a file that is not one well-formed YAML mapping.
    """
    if isinstance(source, Mapping):
        problems = [f"hparams: key {key!r} is not text." for key in source if not isinstance(key, str)]
        if problems:
            raise InputError(problems)
        return Document("hparams", copy.deepcopy(dict(source)))
    path, name = find(source)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # YAML forbids tabs between tokens; inside JSON strings they are always escaped
    return parse(text, name)


def find(source: str | Path) -> tuple[Path, str]:
    """Path of an hparams file and the name to show for it: an existing file first, then the shipped one.

    Raises:
        InputError: neither exists; the message has near names and lists the shipped ones.
    """
    text = os.fspath(source)
    if os.path.exists(text) and not os.path.isdir(text):
        return Path(text), text
    shipped = [name for name in shipped_names("hparams") if name.endswith(".yaml")]
    name = text if text.endswith(".yaml") else f"{text}.yaml"
    if name in shipped:
        return shipped_path("hparams", name), f"hparams/{name}"
    stems = [known.removesuffix(".yaml") for known in shipped]
    what = "is a folder, not a file" if os.path.isdir(text) else "is neither a file nor a shipped hparams name"
    hint = did_you_mean(text.removesuffix(".yaml"), stems)
    raise InputError(f"hparams {text!r} {what}.{hint} Shipped: {', '.join(stems) or 'none'}.")


def parse(text: str, name: str) -> Document:
    """Parse YAML text into a document.

    Raises:
        InputError: garbled YAML, several documents, an empty file, not a mapping, repeated or non-text keys.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise InputError(f"{name}: the file is empty. It needs at least 'method: NAME'.")
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{name}:{_line(root)}: expected keys and values, such as 'method: memit'.")
        places: dict[Keys, str] = {}
        problems: list[str] = []
        _walk(root, (), name, places, problems, (), set())
        if problems:
            raise InputError(problems)
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{where}: not valid YAML: {what}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Control characters, impossible dates, nesting beyond the interpreter's stack.
        raise InputError(f"{name}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}.") from error
    return Document(name, data, places)


def parse_set(item: str) -> tuple[tuple[str, ...], Any]:
    """Split one ``a.b=c`` of ``--set`` into its key path and its value, read as YAML.

    Raises:
        InputError: no ``=``, an empty key or part of one, no value, or a value that is not YAML.
    """
    key, equals, text = item.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise InputError(f"--set {item!r}: expected KEY=VALUE, for example --set value.lr=0.1.")
    if not text.strip():
        raise InputError(f"--set {item!r}: no value after '='. Write {key.strip()}=null for none.")
    name = f"--set {item!r}"
    try:
        data = parse("value: " + text, name).data  # the same checks as in a file
    except InputError as error:
        raise InputError(name + problem.removeprefix(name).removeprefix(":1") for problem in error.problems) from error
    if len(data) != 1:
        raise InputError(f"{name}: the value is more than one line of YAML. Give each key its own --set.")
    return path, data["value"]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _walk(
    node: yaml.Node,
    path: Keys,
    name: str,
    places: dict[Keys, str],
    problems: list[str],
    parents: tuple[int, ...],
    seen: set[int],
) -> None:
    """Record the place of every key below ``node`` and collect what is wrong with the keys."""
    if id(node) in parents:
        problems.append(f"{name}:{_line(node)}: an alias (*) refers to the mapping or list that contains it.")
        return
    if id(node) in seen:  # an alias: its keys are checked already, and aliases of aliases would multiply
        return
    parents = (*parents, id(node))
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), name, places, problems, parents, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            _walk(value, path, name, {}, problems, parents, seen)
            continue
        if key.tag != "tag:yaml.org,2002:str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            problems.append(f"{name}:{_line(key)}: key {shown!r} is not text; put it in quotes.")
            continue
        here = (*path, key.value)
        if key.value in first:
            dotted = ".".join(map(str, here))
            problems.append(
                f"{name}:{_line(key)}: key {dotted!r} is already set on line {first[key.value]}. Keep one of them."
            )
        first.setdefault(key.value, _line(key))
        places[here] = f"{name}:{_line(key)}"
        _walk(value, here, name, places, problems, parents, seen)
