"""The benchmark of all methods, on a tiny model: what was taught, and what it knew."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import saved
import tiny
from edits import TAUGHT
from runs import write_lines

from editunlearn import methods as every
from editunlearn.hparams import load_hparams

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import methods

IDK = "method: idk\ntrain: {what: lora, rank: 2, epochs: 6, lr: 0.03, batch: 2}\n"
WILD = "method: npo\ntrain: {epochs: 9, lr: 0.05, batch: 1}\nlimits: {norm: 0.01}\n"
QUESTIONS = [(f"Where does {subject} lie?", answer) for _, subject, answer in TAUGHT]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lm = tiny.taught_lm([(prompt, answer) for prompt, _, answer in TAUGHT])
    saved.model(lm, tmp_path / "model")
    for name, text in (("idk", IDK), ("wild", WILD)):
        (tmp_path / f"{name}.yaml").write_text(text)
    write_lines(tmp_path / "facts.jsonl", [{"prompt": p, "subject": s, "answer": a} for p, s, a in TAUGHT])
    perturbed = [
        {"question": q, "answer": a, "paraphrased_answer": f"It is {a}", "perturbed_answer": ["Rome", "Paris"]}
        for q, a in QUESTIONS
    ]
    files = {"forget10_perturbed": perturbed, "forget01": perturbed[:2], "forget01_perturbed": perturbed[:2]}
    files |= dict.fromkeys(("real_authors_perturbed", "world_facts_perturbed"), perturbed[2:4])
    for name, records in {**files, "holdout01": [{"question": "Who?", "answer": "Ana"}]}.items():
        write_lines(tmp_path / f"{name}.json", records)
    return tmp_path


def call(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    out = folder / "found.json"
    common = ["--model", str(folder / "model"), "--work", str(folder / words[0]), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *words, *common])
    methods.main()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_taught_and_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["tofu", "--data", str(folder), "--epochs", "2", "--trained-on", "1e9", "--methods"]
    first = call(folder, monkeypatch, *words, str(folder / "idk.yaml"))
    assert [r["name"] for r in first["rows"]] == ["unedited", "never knew", "idk"]
    found = call(folder, monkeypatch, *words, str(folder / "wild.yaml"))  # more methods, the same files
    rows = {r["name"]: r["values"] for r in found["rows"]}
    assert list(rows) == ["unedited", "never knew", "idk"] and "limits.norm" in found["failed"]["wild"]
    assert rows["idk"].keys() == set(methods.COLUMNS) and rows["idk"]["leak, paraphrases"] is None
    assert rows["idk"] == first["rows"][2]["values"] and len(found["commands"]) == 2
    assert rows["unedited"]["forget quality"] is not None and rows["never knew"]["forget quality"] is None
    table = (folder / "found.md").read_text()
    assert "| idk |" in table and "- wild:" in table


def test_known_and_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["known", "--facts", str(folder / "facts.jsonl"), "--forget", "2", "--retain", "2"]
    found = call(folder, monkeypatch, *words, "--methods", str(folder / "idk.yaml"))
    rows = {r["name"]: r["values"] for r in found["rows"]}
    assert list(rows) == ["unedited", "idk"] and "utility" not in rows["idk"]
    assert rows["unedited"]["leak"] == 1.0 and rows["idk"]["leak, 4 bits"] is not None


def test_all_methods_are_meant() -> None:
    found = {load_hparams(name).method for name in methods.shipped()}
    assert found == set(every.names()) and not any("paper" in name for name in methods.shipped())
