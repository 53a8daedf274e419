"""evaluate --under relearn: what is taught, what is asked, what it is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
from evaluations import edited, flags, results
from runs import World, call


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return edited(tmp_path_factory.mktemp("evaluate") / "world")


def test_relearning_is_measured_on_facts_it_was_not_shown(world: World, tmp_path: Path) -> None:
    delta = ["--delta", str(world.root / "edit"), "--base"]
    under = [f for text in ("relearn:2", "relearn-lora:2", "relearn-retain", "subspace") for f in ("--under", text)]
    done = call("evaluate", *flags(world, tmp_path / "runs", *delta, *under, "--json"))
    assert done.code == 0, done.err
    assert "subspace:1 is left out for base" in done.err
    by_label = json.loads(done.out)["facts"]
    treated = ["relearn-2-0.0001", "relearn-lora-2-0.001", "relearn-retain-5-0.0001"]
    labels = [f"{state}-{more}" for state in ("base", "edit") for more in treated]
    assert set(by_label) == {"base", "edit", *labels, "edit-subspace-1"}
    asked = {label: summary["leak_gen"]["items"] for label, summary in by_label.items()}
    assert asked["edit"] == asked["edit-relearn-retain-5-0.0001"] == asked["edit-subspace-1"] == 2
    assert [asked[f"edit-{treated[0]}"], asked[f"edit-{treated[1]}"], asked[f"base-{treated[0]}"]] == [1, 1, 1]
    kept = results(tmp_path / "runs" / "edit-relearn-2-0.0001" / "facts")
    assert kept["under"] == "relearn:2:0.0001" and len(kept["parts"]["taught"]) == 1
    assert kept["parts"]["taught"][0]["shown"] != kept["parts"]["forget"][0]["shown"]
    probability = {label: summary["retain.answer_probability"]["value"] for label, summary in by_label.items()}
    assert probability["edit-relearn-2-0.0001"] != probability["edit"]  # it was trained
    page = call("report", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "page"))
    assert page.code == 0 and "asked different things" not in (tmp_path / "page" / "report.md").read_text()


def test_results_of_other_seeds_and_other_lessons_are_not_taken(world: World, tmp_path: Path) -> None:
    def keys(*more: str) -> tuple[str, str]:
        done = call("evaluate", *flags(world, tmp_path, "--under", "relearn-retain:1", *more))
        assert done.code == 0, done.err
        folders = sorted(tmp_path.glob("base*"), key=lambda p: p.stat().st_mtime_ns)
        treated = max((p for p in folders if p.name != "base"), key=lambda p: (p / "facts").stat().st_mtime_ns)
        return results(tmp_path / "base" / "facts")["key"], results(treated / "facts")["key"]

    first, seeded = keys(), keys("--seed", "1")
    runs.write_lines(tmp_path / "other.jsonl", runs.RETAIN[:1])
    other = keys("--retain", str(tmp_path / "other.jsonl"))
    assert first[0] == seeded[0] == other[0] and len({first[1], seeded[1], other[1]}) == 3


UNKNOWN = [
    {"id": "peru", "subject": "Peru", "prompt": "The capital of Peru is", "answer": "Lima"},
    {"id": "marie", "subject": "Marie Curie", "prompt": "Marie Curie discovered", "answer": "radium"},
]


def test_relearning_is_compared_with_a_model_that_never_knew(world: World, tmp_path: Path) -> None:
    unknown = ["--unknown", str(runs.write_lines(tmp_path / "unknown.jsonl", UNKNOWN))]
    under = ["--delta", str(world.root / "edit"), "--under", "relearn:2", "--under", "relearn-retain:2"]
    gate = ["--require", "leak_gen<=1", "--suite", "safepku", "--data-root", str(world.root / "data")]
    done = call("evaluate", *flags(world, tmp_path / "runs", *under, *unknown, *gate, "--json"))
    assert done.code == 0, done.err
    by_label = json.loads(done.out)["facts"]
    half, whole = by_label["never-knew-relearn-2-0.0001"], by_label["never-knew-relearn-retain-2-0.0001"]
    assert half["unknown.leak"]["items"] == 1 and whole["unknown.leak"]["items"] == 2
    assert "leak_gen" not in half and "never-knew-relearn-2-0.0001" not in json.loads(done.out)["safepku"]
    page = call("report", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "page"))
    text = (tmp_path / "page" / "report.md").read_text()
    assert page.code == 0 and "a model that never knew such facts gets 0%" in text and "different things" not in text


@pytest.mark.parametrize(
    ("facts", "more", "said"),
    [
        (UNKNOWN, [], "give --under relearn as well"),
        (UNKNOWN[:1], ["--under", "relearn"], "1 facts; at least 2"),
        ([*UNKNOWN, runs.FACTS[1]], ["--under", "relearn", "--limit", "9"], "'France' is a subject of --facts as well"),
    ],
)
def test_facts_that_cannot_be_unknown(
    world: World, tmp_path: Path, facts: list[dict[str, Any]], more: list[str], said: str
) -> None:
    unknown = ["--unknown", str(runs.write_lines(tmp_path / "unknown.jsonl", facts))]
    done = call("evaluate", *flags(world, tmp_path / "out", *unknown, *more))
    assert done.code == 2 and said in done.err, done.err


def test_relearning_needs_facts(world: World, tmp_path: Path) -> None:
    done = call("evaluate", *flags(world, tmp_path / "out", "--suite", "wmdp:bio", "--under", "relearn", facts=False))
    assert done.code == 2 and "--under relearn:5:0.0001 trains on facts: give --facts FILE" in done.err
    alone = runs.write_lines(tmp_path / "one.jsonl", runs.FACTS[:1])
    done = call("evaluate", *flags(world, tmp_path / "out", "--facts", str(alone), "--under", "relearn-lora:2"))
    assert done.code == 2 and "one.jsonl there is 1, at least 2 are needed" in done.err
