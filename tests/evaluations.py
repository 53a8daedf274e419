"""Calls of evaluate on a tiny edited model, for the tests of that command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_data
import runs
from runs import World, call


def flags(world: World, out: Path, *more: str, facts: bool = True) -> list[str]:
    found = ["--out", str(out), "--cache-dir", str(world.cache), "--model", str(world.model)]
    if facts:
        found += ["--facts", str(world.root / "facts.jsonl"), "--retain", str(world.root / "retain.jsonl")]
        found += ["--suite", "facts", "--limit", "2"]
    return [*found, *more]


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def edited(root: Path) -> World:
    """A world with benchmark data in ``data`` and an edit in ``edit``."""
    made = runs.build(root)
    benchmark_data.write(made.root / "data")
    assert call("apply", *made.flags(made.root / "edit", "--evaluate", "none")).code == 0
    return made
