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
import memory
import merging

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
    assert "99 facts: left out, the model knows 3" in capsys.readouterr().out
    for run in runs:
        assert run["base"]["leak"] == 1.0 and run["edited"]["perplexity"] > 0 and run["edited"]["token_ms"] > 0
    table = Path(flags[-1]).with_suffix(".md").read_text()
    assert table.count("| grace | batch |") == 2 and "100.0% > " in table
    asked: list[Any] = []
    monkeypatch.setattr(editors, "run", lambda *a, **_: asked.append(a))
    assert call(memory.main, monkeypatch, *words)["runs"] == runs and not asked


def test_merging(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "FORMS", {", closed form alone": ("refine=null",)})
    monkeypatch.setattr(merging, "METHODS", ("memit",))
    words = [*flags, "--sizes", "2", "--set", *FEW, "moments.tokens=500", "moments.length=32", "retain.lookalikes=0"]
    runs = call(merging.main, monkeypatch, *words, "limits.norm=100")["runs"]
    assert [r["name"].split(", ")[1] for r in runs] == list(merging.MERGED)
    assert all(r["hparams"]["refine"] is None for r in runs)
    assert [r["hparams"]["merge"] is None for r in runs] == [True, False, False, False]


def test_what_is_worse_is_said_and_what_was_stopped_too() -> None:
    one = {"name": "memit", "facts": 200, "seed": 0, "base": {}, "fit_seconds": 1.0, "delta_mb": 1.0}
    numbers = {"leak": 0.1, "refusal": 0.9, "retain_accuracy": 1.0, "heldout_accuracy": 0.9}
    batch = {**one, "way": "batch", "edited": numbers}
    assert grid.worse([batch, {**one, "way": "sequential", "edited": {**numbers, "leak": 0.14}}]) == []
    (line,) = grid.worse([batch, {**one, "way": "sequential", "edited": {**numbers, "refusal": 0.8}}])
    assert "refusal 90.0% in batch, 80.0% sequentially" in line
    stopped = {**one, "way": "sequential", "edited": None, "stopped": "perplexity"}
    assert grid.worse([batch, stopped]) == [] and "stopped: perplexity" in grid.row(stopped)
