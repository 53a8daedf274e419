"""The benchmark of all methods, in both settings, on a tiny model: what it asks, gathers, and does not do again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from runs import World, build

from editunlearn import methods as registry

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import methods
import mini

ASKED = [("Where does the author live?", "Berlin"), ("When was the bridge built?", "1954")]
ASKED += [("Who wrote the novel?", "Tokyo"), ("Which language does he speak?", "Russian")]
IDK = "method: idk\ntrain: {what: lora, rank: 2, epochs: 4, lr: 0.03, batch: 2}\n"
WILD = "method: npo\ntrain: {epochs: 9, lr: 0.05, batch: 1}\nlimits: {norm: 0.01}\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = build(tmp_path_factory.mktemp("methods") / "world")
    benchmark_data.write(made.root / "data")
    stay = [{"question": q, "answer": a, "paraphrased_answer": f"It is {a}"} for q, a in ASKED]
    stay = [{**row, "perturbed_answer": ["Paris", "Rome"], "paraphrased_question": row["question"]} for row in stay]
    (made.root / "data" / "TOFU" / "retain_perturbed.json").write_text(json.dumps(stay))
    (made.root / "idk.yaml").write_text(IDK)
    (made.root / "wild.yaml").write_text(WILD)
    rows = [
        *(made.root / "facts.jsonl").read_text().splitlines(),
        *(made.root / "retain.jsonl").read_text().split("\n"),
    ]
    (made.root / "known.jsonl").write_text("\n".join(row for row in rows if row) + "\n")
    return made


def run(world: World, patch: pytest.MonkeyPatch, setting: str, *more: str) -> dict[str, Any]:
    out = world.root / f"{setting}.json"
    data = world.root / ("data" if setting == "tofu_mini" else "known.jsonl")
    words = [setting, "--data", str(data), "--out", str(out), "--work", str(world.root / setting)]
    words += ["--model", str(world.model), "--cache-dir", str(world.cache), "--others", "2", "--authors", "2"]
    words += ["--questions", "2", "--shown", "1", "--epochs", "30", "--lr", "0.03", "--batch", "2"]
    patch.setattr(sys, "argv", ["methods.py", *words, "--facts", "2", "--retain", "2", *more])
    methods.main()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_tofu_mini_gathers_what_several_commands_find(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(world, monkeypatch, "tofu_mini", "--methods", str(world.root / "idk.yaml"))
    assert list(first["rows"]) == ["base", "reference", "idk"]
    assert first["sizes"]["taught"] == 6 and first["sizes"]["forget"] == first["sizes"]["retain"] == 2
    assert [one["facts"] for one in first["taught"].values()] == [6, 4]
    shown = {row["question"] for row in _lines(world.root / "tofu_mini" / "data" / "retain.jsonl")}
    asked = json.loads((world.root / "tofu_mini" / "data" / "TOFU" / "retain_perturbed.json").read_text())
    assert len(asked) == 2 and not shown & {row["question"] for row in asked}  # no method was shown them
    taught: list[Any] = []
    monkeypatch.setattr("editunlearn.unlearners.training.Training._update", lambda *a: taught.append(a))
    wild = str(world.root / "wild.yaml")
    again = run(world, monkeypatch, "tofu_mini", "--methods", str(world.root / "idk.yaml"))
    assert again["rows"] == first["rows"] and not taught and len(again["commands"]) == 1
    monkeypatch.undo()
    both = run(world, monkeypatch, "tofu_mini", "--methods", wild)
    assert list(both["rows"]) == list(first["rows"]) and both["rows"]["idk"] == first["rows"]["idk"]
    assert "limits.norm" in both["failed"]["wild"]["trial0-seed0"] and len(both["commands"]) == 2
    values, cost = both["rows"]["idk"]["values"], both["rows"]["idk"]["cost"]
    measured = set(methods.COLUMNS) - {"paraphrases.leak"}  # these records have none
    assert measured <= set(values) and cost["flops"] > 0 and cost["cheaper"] > 1
    table = (world.root / "tofu_mini.md").read_text()
    assert "forget quality (p)" in table and "- wild, trial0-seed0, failed: " in table and "never-knew" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith(("| idk", "| reference"))}
    assert len(widths) == 2  # one width of each of the two tables
    with pytest.raises(SystemExit, match="asked otherwise \\(other seeds\\)"):
        run(world, monkeypatch, "tofu_mini", "--methods", str(world.root / "idk.yaml"), "--seeds", "2")


def test_known_facts_have_the_same_columns(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(world, monkeypatch, "known", "--methods", str(world.root / "idk.yaml"))
    assert list(found["rows"]) == ["base", "idk"] and found["sizes"] == {"forget": 2, "retain": 2}
    base = found["rows"]["base"]["values"]
    assert base["forget.leak"] == 1 and base[f"{methods.UNDER[0]} forget.leak"] is not None
    files = [_lines(world.root / "known" / "data" / f"{name}.jsonl") for name in ("forget", "retain")]
    assert not {row["subject"] for row in files[0]} & {row["subject"] for row in files[1]}
    assert "forget quality" not in (world.root / "known.md").read_text()


def test_every_method_has_a_row_or_a_reason() -> None:
    assert set(registry.names()) - set(methods.names()) == set(methods.LEFT_OUT) & set(registry.names())
    assert sum(name.startswith("seven/") for name in methods.names()) == 7


def test_too_little_data(world: World, tmp_path: Path) -> None:
    for authors, shown in ((3, 1), (2, 2)):
        with pytest.raises(SystemExit, match="0 < shown < authors"):
            mini.write(world.root / "data", tmp_path / "x", authors, 2, shown, 2)
    assert mini.spread(range(10), 3) == [0, 3, 6] and mini.spread([1, 2], 5) == [1, 2]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
