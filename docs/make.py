"""Pages that are made from the code: ``python docs/make.py`` writes them, ``tests/test_docs.py`` says when to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from editunlearn import editors, methods
from editunlearn.__main__ import COMMANDS
from editunlearn.artifacts import atomic_write_text
from editunlearn.evaluation.metrics import Definition
from editunlearn.evaluation.metrics.glossary import MODULES
from editunlearn.hparams import BlockHParams, EditorHParams, MemoryHParams, UnlearnerHParams
from editunlearn.hparams.check import allowed
from editunlearn.resources import shipped_names, shipped_path

FOLDER = Path(__file__).parent
MADE = "Made by `python docs/make.py`."


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a Markdown table, and an empty one behind it."""
    head = list(columns)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) + " |")
    return [*lines, ""]


def metrics() -> str:
    """Definitions of all metrics, a table for each module."""
    lines = [
        "# Metrics",
        "",
        f"{MADE} *Better* is meant for what is to be forgotten; on what is to stay, the other way round.",
        "*reference*: best is what a model has that never saw the forget set. What cannot be measured is `null`, with",
        "the reason.",
    ]
    for module in MODULES:
        lines += ["", f"## {(module.__doc__ or '').strip().rstrip('.')}", ""]
        rows = [(f"`{d.name}`", d.better, _range(d), d.formula, d.source, d.caution) for d in module.DEFINITIONS]
        lines += table(["metric", "better", "range", "formula", "source", "caution"], rows)[:-1]
    return "\n".join(lines) + "\n"


def _range(definition: Definition) -> str:
    low, high = ("-inf" if definition.low is None else f"{definition.low:g}"), definition.high
    return f"{low} to {'inf' if high is None else f'{high:g}'}"


def commands() -> str:
    """Every command with its flags and examples, as its own parser has them."""
    lines = ["# Commands", "", f"{MADE} `editunlearn COMMAND` is `python -m editunlearn.COMMAND`.", ""]
    lines += table(["command", "what it does"], [(f"[`{name}`](#{name})", what) for name, what in COMMANDS.items()])
    for name in COMMANDS:
        p: argparse.ArgumentParser = import_module(f"editunlearn.{name}").flags()
        lines += [f"## {name}", "", (p.description or "").partition(": ``")[0].rstrip(".") + ".", ""]
        for group in p._action_groups:
            rows = [_flag(a) for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
            if rows:
                lines += [f"**{group.title}**", "", *table(["flag", "what it says"], rows)]
        lines += ["```bash", *_examples(p), "```", ""]
    return "\n".join(lines)


def _flag(action: argparse.Action) -> tuple[str, str]:
    """How a flag is written, and its help."""
    names = ", ".join(f"`{option}`" for option in action.option_strings)
    value = str(action.metavar or action.dest.upper())
    if action.choices is not None:
        value = ", ".join(map(str, action.choices))
    takes = f" `{value}`" if action.nargs != 0 else ""
    return (names + takes).strip() + (" (required)" if action.required else ""), action.help or ""


def _examples(p: argparse.ArgumentParser) -> list[str]:
    """Examples of the help; what stands behind one is a comment."""
    lines = (p.epilog or "").splitlines()[1:]
    found = [line.strip().partition("   ") for line in lines]
    return [command + (f"   # {said.strip()}" if said else "") for command, _, said in found]


def hparams() -> str:
    """Every setting of every method: its key, its default, what is allowed and what it does."""
    kinds = {
        "Editors": EditorHParams,
        "Memories": MemoryHParams,
        "Blocks": BlockHParams,
        "Unlearners": UnlearnerHParams,
    }
    lines = [
        "# Settings",
        "",
        f"{MADE} A file of settings names its `method`, and any of that method's keys. What counts, from weak to",
        "strong: the defaults below, the file, its `overrides` for the model's type, `--set KEY=VALUE`. An unknown key",
        "is an error.",
        "",
        "## Shipped files",
        "",
        *table(["`--hparams`", "method", "what for"], _shipped()),
    ]
    pieces: dict[str, type[BaseModel]] = {}
    for title, kind in kinds.items():
        lines += [f"## {title}", "", f"{_said(kind)} Then what each method has besides, or other defaults.", ""]
        lines += _keys(kind.model_fields, pieces)
        for name in [n for n in methods.names() if issubclass(methods.schema(n), kind)]:
            schema = methods.schema(name)
            paper = schema.model_fields["paper"].default or ""
            said = _said(editors.module(name) if name in editors.names() else schema)
            lines += [f"### {name}", "", said if paper in said else f"{said} {paper}", ""]
            lines += _keys(_own(schema, kind), pieces)
    lines += ["## Groups of settings", "", "What a key of the tables above, or of one of these, holds.", ""]
    done: set[str] = set()
    while left := [name for name in pieces if name not in done]:
        for name in left:
            lines += [f"### {name}", "", _said(pieces[name]), ""]
            lines += _keys(pieces[name].model_fields, pieces)
            done.add(name)
    return "\n".join(lines)


def _said(thing: Any) -> str:
    """The first paragraph of what documents a class or a module."""
    return " ".join((thing.__doc__ or "").partition("\n\n")[0].split())


def _shipped() -> list[tuple[str, str, str]]:
    rows = []
    for name in shipped_names("hparams"):
        if name.endswith(".yaml"):
            text = shipped_path("hparams", name).read_text(encoding="utf-8")
            method, first = yaml.safe_load(text)["method"], text.partition("\n")[0]
            what = first.removeprefix("#").strip() if first.startswith("#") else ""
            rows.append((f"`{name.removesuffix('.yaml')}`", f"[{method}](#{method})", what))
    return rows


def _own(schema: type[BaseModel], kind: type[BaseModel]) -> Mapping[str, FieldInfo]:
    """Fields that a method adds, or gives another default."""
    fields = {}
    for name, field in schema.model_fields.items():
        of_kind = kind.model_fields.get(name)
        if name in ("method", "paper"):
            continue
        if of_kind is None or _default(field) != _default(of_kind):
            fields[name] = field
    return fields


def _keys(fields: Mapping[str, FieldInfo], pieces: dict[str, type[BaseModel]]) -> list[str]:
    rows = []
    for name, field in fields.items():
        piece = _piece(field)
        may = allowed(field)
        if piece is not None:
            if pieces.setdefault(piece.__name__, piece) is not piece:
                raise ValueError(f"two groups of settings are called {piece.__name__}; the page needs two names.")
            may = f"[{piece.__name__}](#{piece.__name__.lower()})" + (", or null" if may.endswith(", or null") else "")
        rows.append((f"`{name}`", _shown(field), may, field.description))
    return table(["key", "default", "allowed", "what it does"], rows) if rows else []


def _piece(field: FieldInfo) -> type[BaseModel] | None:
    options = [field.annotation, *get_args(field.annotation)]
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _shown(field: FieldInfo) -> str:
    """The default; of a group only where it differs from the group's own."""
    if field.is_required():
        return "required"
    value = _default(field)
    if not isinstance(value, BaseModel):
        return f"`{_flow(value)}`"
    changed = {k: v for k, v in value.model_dump(mode="json").items() if v != _default(type(value).model_fields[k])}
    return f"`{_flow(changed)}`" if changed else "its own"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


PAGES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {"commands.md": commands, "hparams.md": hparams, "metrics.md": metrics}
)


def main() -> int:
    """Write the pages."""
    for name, make in PAGES.items():
        atomic_write_text(FOLDER / name, make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
