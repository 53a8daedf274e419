"""The command compare by two processes: each run is made by one of them, and the table is that of one process."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import runs
from test_compare import HPARAMS, flags

from editunlearn.lm.processes import Processes

SETTINGS = "method: memit\n" + "".join(
    f"{key}\n"
    for key in (
        "layers: [0]",
        "context_prefixes: {count: 1}",
        "value: {steps: 3}",
        "refine: {steps: 3, text_length: 32}",
        "moments: {text: TEXT, length: 32}",
    )
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> runs.World:
    made = runs.build(tmp_path_factory.mktemp("compare-processes") / "world")
    for name, text in {**HPARAMS, "quick": SETTINGS.replace("TEXT", str(made.root / "text.txt"))}.items():
        (made.root / f"{name}.yaml").write_text(text)
    return made


def words(world: runs.World, out: Path) -> list[str]:
    methods = [str(world.root / f"{name}.yaml") for name in ("quick", "grin", "idk", "wild")]
    terms = ["--trials", "2", "--seeds", "2", "--match", "1", "--methods", ",".join(methods)]
    return flags(world, out, *terms)


@pytest.fixture(scope="module")
def alone(world: runs.World) -> dict[str, Any]:
    """What one process finds, with moments and context prefixes in the cache already: all edits are the very same."""
    for name in ("first", "alone"):
        called = runs.call("compare", *words(world, world.root / name))
        assert called.code == 0, called.err
    return comparison(world.root / "alone")


def comparison(out: Path, *, counted: bool = True) -> dict[str, Any]:
    """All that is in the file but times and memory, which are nobody's twice.

    Args:
        counted: also operations and tokens, which of interrupted work are those of the last part.
    """
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    for method in found["methods"].values():
        for cost in method["costs"]:
            for name in ("seconds", "memory", "resumed", *(() if counted else ("flops", "tokens"))):
                del cost[name]
    return found


def edits(out: Path) -> dict[Path, int]:
    """When each delta was last written."""
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.glob("runs/*/*/delta.json")}


@pytest.mark.parametrize("launcher", [runs.TORCHRUN, runs.SLURM], ids=["torchrun", "slurm"])
def test_two_processes_make_the_table_of_one(
    launcher: list[dict[str, str]], world: runs.World, alone: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    first, second = runs.launch(launcher, tmp_path, "editunlearn.compare", *words(world, tmp_path / "two"))
    assert first.code == second.code == 0, first.err + second.err
    assert second.out == second.err == "" and "all leak" in first.out
    assert comparison(tmp_path / "two") == alone
    made, wanted = (runs.listing(out) for out in (tmp_path / "two", world.root / "alone"))
    assert made == wanted


def test_moments_are_measured_once_by_both(world: runs.World, tmp_path: Path) -> None:
    given = words(world, tmp_path / "two")
    given[given.index("--cache-dir") + 1] = str(tmp_path / "cache")
    given[given.index("--methods", -2) + 1] = str(world.root / "quick.yaml")
    first, second = runs.launch(runs.TORCHRUN, tmp_path, "editunlearn.compare", *given, "--verbose")
    assert first.code == second.code == 0, first.err + second.err
    assert len(list((tmp_path / "cache" / "moments").rglob("moment.safetensors"))) == 1
    assert not list((tmp_path / "cache").rglob("partial*"))


def test_one_is_killed_and_the_comparison_goes_on(world: runs.World, alone: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "two"
    working = runs.started(runs.TORCHRUN, tmp_path, "editunlearn.compare", *words(world, out))
    while len(edits(out)) < 3:
        assert all(process.poll() is None for process in working)
        time.sleep(0.02)
    working[1].kill()
    first, second = runs.ended(working)
    assert (first.code, second.code) == (1, -9)  # the one that is left does not wait for it
    assert "another of the 2 processes has ended. Finished work is kept" in first.err
    assert not (out / "comparison.json").exists()
    before = edits(out)
    first, second = runs.launch(runs.TORCHRUN, tmp_path, "editunlearn.compare", *words(world, out))
    assert first.code == second.code == 0, first.err + second.err
    assert comparison(out, counted=False) == comparison(world.root / "alone", counted=False)
    after = edits(out)
    assert before and all(before[path] == when for path, when in after.items() if path in before)


def test_what_one_process_raises_comes_after_the_rest(tmp_path: Path) -> None:
    (tmp_path / "deals.py").write_text(
        """
import sys, time
from pathlib import Path
from editunlearn.lm.processes import joined
def make(item):
    if item == 0:
        raise ValueError("the first item")
    time.sleep(0.05 * item)
    Path(f"made-{item}").touch()
    return item * item
with joined() as here:
    print(here.dealt("good", range(1, 9), make))
    here.dealt("bad", range(9), make)
""",
        encoding="utf-8",
    )
    both = runs.launch(runs.TORCHRUN, tmp_path, "deals")
    assert [one.code for one in both] == [1, 1]
    for one in both:
        assert one.out.strip() == str([n * n for n in range(1, 9)]) and "ValueError: the first item" in one.err
    assert {path.name for path in tmp_path.glob("made-*")} == {f"made-{n}" for n in range(1, 9)}


def test_one_process_deals_to_itself() -> None:
    said: list[int] = []
    assert Processes().dealt("x", [3, 1, 2], lambda n: -n, said.append) == [-3, -1, -2] and sum(said) == 3
