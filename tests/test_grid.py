"""The benchmarks of memories and of query merging, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import saved
import tiny
from edits import TAUGHT

from editunlearn import editors

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import grid
import latency
import layers
import memory
import merging
import peaks
import processes
import targets

FEW = ["layers=[1]", "context_prefixes.count=1", "value.steps=2"]


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lm = tiny.taught_lm([(prompt, answer) for prompt, _, answer in TAUGHT])
    saved.model(lm, tmp_path / "model")
    rows = [{"prompt": p, "subject": s, "answer": a} for p, s, a in TAUGHT]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("A river runs through the old town . " * 14 + "\n")
    found = ["--model", str(tmp_path / "model"), "--facts", str(tmp_path / "facts.jsonl")]
    found += ["--text", str(tmp_path / "text.txt"), "--retain", "1", "--heldout", "2", "--all"]
    return [*found, "--out", str(tmp_path / "found.json")]


def call(main: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    main()
    found: dict[str, Any] = json.loads(Path(words[words.index("--out") + 1]).read_text())
    return found


def test_memories(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*flags, "--methods", "grace", "--sizes", "1", "2", "99", "--set", *FEW]
    runs = call(memory.main, monkeypatch, *words)["runs"]
    assert [(r["facts"], r["way"]) for r in runs] == [(1, "batch"), (2, "batch"), (2, "sequential")]
    assert "99 facts: left out, there are 3" in capsys.readouterr().out
    for run in runs:
        assert run["base"]["leak"] == 1.0 and run["edited"]["perplexity"] > 0
    table = Path(flags[-1]).with_suffix(".md").read_text()
    assert table.count("| grace | batch |") == 2 and "100.0% > " in table
    asked: list[Any] = []
    monkeypatch.setattr(editors, "run", lambda *a, **_: asked.append(a))
    assert call(memory.main, monkeypatch, *words)["runs"] == runs and not asked


def test_latency(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", flags[1], "--sizes", "1", "150", "--rounds", "1", "--out", flags[-1]]
    runs = call(latency.main, monkeypatch, *words)["runs"]
    assert [(run["method"], run["facts"]) for run in runs] == [("grace", 1), ("grace", 150), ("wise", 1), ("wise", 150)]
    assert all(run[f"{what} {state}"] > 0 for run in runs for what in ("prompt", "token") for state in latency.STATES)
    assert runs[1]["mb"] == pytest.approx(150 * runs[0]["mb"])  # a codebook grows with its facts
    assert runs[3]["mb"] < 10 * runs[2]["mb"]  # a side memory serves a hundred
    table = Path(flags[-1]).with_suffix(".md").read_text().splitlines()
    assert len({line.count("|") for line in table[2:]}) == 1 and len(table) == 8


def test_merging(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "METHODS", ("memit",))
    words = [
        *flags,
        "--sizes",
        "2",
        "--forms",
        "closed",
        "--set",
        *FEW,
        "moments.tokens=500",
        "moments.length=32",
        "retain.lookalikes=0",
    ]
    runs = call(merging.main, monkeypatch, *words, "retain.lookalikes=0", "limits.norm=100")["runs"]
    assert [r["name"].split(", ")[1] for r in runs] == list(merging.MERGED)
    assert all(r["hparams"]["refine"] is None for r in runs)
    assert [r["hparams"]["merge"] is None for r in runs] == [not values for values in merging.MERGED.values()]


def test_layers(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*flags, "--sizes", "2", "--windows", "0-1", "1-2", "--forms", "closed", "--set", *FEW[1:]]
    words += ["moments.tokens=500", "moments.length=32", "retain.lookalikes=0", "limits.norm=100"]
    runs = call(layers.main, monkeypatch, *words)["runs"]
    assert [r["hparams"]["layers"] for r in runs] == ["auto", [0, 1], [1, 2]]
    assert [r["name"] for r in runs] == ["memit closed, auto", "memit closed, blocks 0-1", "memit closed, blocks 1-2"]


def test_targets_of_facts_from_another_file(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "The capital of Atlantis is", "subject": "Atlantis", "answer": "Poseidonia"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    words = [*flags, "--forget", str(tmp_path / "asked.jsonl"), "--sizes", "1", "--methods", "grace", "--set", *FEW]
    runs = call(targets.main, monkeypatch, *words)["runs"]
    assert [r["name"].split(", ")[1] for r in runs] == list(targets.TARGETS)
    for run in runs:
        assert run["data"] == "asked.jsonl" and run["sizes"] == [1, 1, 2] and run["base"]["leak"] == 0.0


def test_processes(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "RUNS", {name: processes.RUNS[name] for name in ("one process", "two processes")})
    words = ["--model", flags[1], "--tokens", "600", "--out", flags[-1]]
    found = call(processes.main, monkeypatch, *words)
    assert found["runs"]["two processes"]["apart"] < 1e-5 and len(found["runs"]["two processes"]["cpu_seconds"]) == 2
    assert found["speed_up"] > 0 and "tokens a CPU second" in Path(flags[-1]).with_suffix(".md").read_text()


def test_peaks_are_measured_once_and_planned_anew(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []
    monkeypatch.setattr(peaks, "planned", lambda _: 3e9)
    monkeypatch.setattr(peaks, "peak", lambda command: measured.append(command) or 2e9)
    words = ["--models", "demo:bfloat16", "--methods", "memit", "npo", "--out", flags[-1]]
    found = call(peaks.main, monkeypatch, *words)["runs"]
    assert [one["ratio"] for one in found] == [1.5, 1.5] and len(measured) == 2
    monkeypatch.setattr(peaks, "planned", lambda _: 1e9)
    found = call(peaks.main, monkeypatch, *words[:4], *words[-2:])["runs"]
    assert [one["ratio"] for one in found] == [0.5, 1.5] and len(measured) == 2
    assert "| demo, bfloat16 | memit | 1.00 | 2.00 | 0.50 |" in Path(flags[-1]).with_suffix(".md").read_text()


def test_what_is_worse_is_said_and_what_was_stopped_too() -> None:
    one = {"name": "memit", "facts": 200, "seed": 0, "base": {}, "fit_seconds": 1.0, "delta_mb": 1.0}
    numbers = {"leak": 0.1, "refusal": 0.9, "retain_accuracy": 1.0, "heldout_accuracy": 0.9}
    batch = {**one, "way": "batch", "edited": numbers}
    (line,) = grid.worse([batch, {**one, "way": "sequential", "edited": {**numbers, "leak": 0.14}}])
    assert line == "None of 1 sequential runs is more than 5 points worse than the same facts in batch."
    (line,) = grid.worse([batch, {**one, "way": "sequential", "edited": {**numbers, "refusal": 0.8}}])
    assert "refusal 90.0% in batch, 80.0% sequentially" in line
    stopped = {**one, "way": "sequential", "edited": None, "stopped": "perplexity"}
    assert grid.worse([batch, stopped]) == [] and "stopped: perplexity" in grid.row(stopped)
