"""What there is: ``python -m editunlearn.ls methods``; also hparams, suites, attacks, models, data and runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import parser, run_command

if TYPE_CHECKING:
    from editunlearn.console import Console

EXAMPLES = """\
  editunlearn ls                   methods, shipped hparams, suites, attacks, architectures
  editunlearn ls hparams
  editunlearn ls runs --in runs    saved edits below a folder"""


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("ls", __doc__ or "", EXAMPLES)
    p.add_argument(
        "what", nargs="*", choices=("all", *_LISTS), default="all", help="which lists (default: all of them but runs)"
    )
    p.add_argument("--in", dest="folder", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    p.add_argument("--json", action="store_true", help="as JSON on standard output")
    p.set_defaults(quiet=False, verbose=0)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    most = [name for name in _LISTS if name != "runs"]
    for what in most if "all" in args.what else args.what:
        rows = _LISTS[what](args.folder)
        found[what] = rows
        columns = list(rows[0]) if rows else ["name"]
        console.table(what, columns, [[row[column] for column in columns] for row in rows])
    console.result_json(found)


def _methods(_folder: Path) -> list[dict[str, Any]]:
    from editunlearn import editors, methods

    rows = []
    for name in methods.names():
        schema = methods.schema(name)
        described = editors.module(name) if name in editors.names() else schema
        first = (described.__doc__ or "").strip().partition("\n")[0]
        paper = schema.model_fields["paper"].default
        rows.append({"name": name, "paper": paper, "what": first})
    return rows


def _hparams(_folder: Path) -> list[dict[str, Any]]:
    import yaml

    from editunlearn.resources import shipped_names, shipped_path

    rows = []
    for name in shipped_names("hparams"):
        if name.endswith(".yaml"):
            method = yaml.safe_load(shipped_path("hparams", name).read_text(encoding="utf-8"))["method"]
            rows.append({"name": name.removesuffix(".yaml"), "method": method})
    return rows


def _suites(_folder: Path) -> list[dict[str, Any]]:
    from editunlearn.evaluation.suites import SUITES

    return [{"name": name, "choices": ", ".join(choices)} for name, choices in SUITES.items()]


def _attacks(_folder: Path) -> list[dict[str, Any]]:
    from editunlearn.evaluation.attacks.prompting import ATTACKS

    return [
        {"name": name, "what": (attack.__doc__ or "").strip().partition("\n")[0]} for name, attack in ATTACKS.items()
    ]


def _models(_folder: Path) -> list[dict[str, Any]]:
    from editunlearn.lm.layout import known_types, table_row

    rows = []
    for kind in known_types():
        row = table_row(kind)
        rows.append({"model_type": kind, "edited": row.mlp_out, "attention": row.attn_out})
    return rows


def _data(_folder: Path) -> list[dict[str, Any]]:
    from editunlearn.resources import shipped_names, shipped_path

    return [{"name": name, "bytes": shipped_path("data", name).stat().st_size} for name in shipped_names("data")]


def _runs(folder: Path) -> list[dict[str, Any]]:
    from editunlearn.deltas.files import MANIFEST, load_manifest
    from editunlearn.errors import InputError

    rows: list[dict[str, Any]] = []
    for path in sorted(folder.rglob(MANIFEST)):
        try:
            made = load_manifest(path.parent)
        except InputError as error:
            rows.append({"folder": str(path.parent), "method": "damaged", "facts": None, "model": error.problems[0]})
            continue
        model = made.base.name
        rows.append({"folder": str(path.parent), "method": made.method, "facts": made.fact_count, "model": model})
    return rows


_LISTS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "methods": _methods,
    "hparams": _hparams,
    "suites": _suites,
    "attacks": _attacks,
    "models": _models,
    "data": _data,
    "runs": _runs,
}


if __name__ == "__main__":
    sys.exit(main())
