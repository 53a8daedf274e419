"""Facts in the forms in which data sets are published: files, local copies and hub ids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fact_files import fact_row, problems_of, write_facts

from editunlearn.facts.readers import load_facts
from editunlearn.facts.records import Neighbor

# known data sets


def test_known_1000() -> None:
    notes: list[str] = []
    row = {"known_id": 0, "subject": "Lake Erd", "attribute": "Peru", "template": "{} lies in",
           "prediction": " Peru", "prompt": "Lake Erd lies in", "relation_id": "P30"}  # fmt: skip
    (fact,) = load_facts([row], notes=notes)
    assert (fact.id, fact.answer, fact.prompt, fact.relation) == ("0", "Peru", "Lake Erd lies in", "P30")
    assert "'attribute' read as answer" in notes[0] and "'prediction'" in notes[1] and len(notes) == 2
    del row["prompt"]
    assert load_facts([row])[0].prompt == "Lake Erd lies in"


def test_counterfact() -> None:
    row = {
        "case_id": 7,
        "pararel_idx": 1,
        "requested_rewrite": {"prompt": "{} speaks", "relation_id": "P1", "subject": "Ann Lee",
                              "target_new": {"str": "Thai", "id": "Q1"},
                              "target_true": {"str": "Dutch", "id": "Q2"}},
        "paraphrase_prompts": ["Long ago. Ann Lee speaks"],
        "neighborhood_prompts": ["Bo Ek speaks", "Cy Moe speaks"],
        "generation_prompts": ["Ann Lee was"],
    }  # fmt: skip
    notes: list[str] = []
    (fact,) = load_facts([row], notes=notes)
    assert (fact.id, fact.prompt, fact.subject, fact.subject_start) == ("7", "Ann Lee speaks", "Ann Lee", 0)
    assert (fact.answer, fact.target, fact.relation) == ("Dutch", "Thai", "P1")
    assert fact.paraphrases == ("Long ago. Ann Lee speaks",)
    assert fact.neighbors == (Neighbor("Bo Ek speaks", "Dutch"), Neighbor("Cy Moe speaks", "Dutch"))
    assert any("'target_new' read as target" in n for n in notes)


def test_zsre() -> None:
    row = {"subject": "Ann Lee", "src": "Where is Ann Lee?", "pred": "x", "rephrase": "Ann Lee's place?",
           "answers": ["Rome", "Roma"], "loc": "nq question: who sings", "loc_ans": "Bo",
           "cond": "x", "alt": "Bonn"}  # fmt: skip
    (fact,) = load_facts([row])
    assert fact.is_question and fact.prompt == "Where is Ann Lee?"
    assert (fact.answer, fact.aliases, fact.target) == ("Rome", ("Roma",), "Bonn")
    assert fact.neighbors == (Neighbor("who sings", "Bo"),) and fact.paraphrases == ("Ann Lee's place?",)
    notes: list[str] = []
    row = {"subject": "Ann", "prompt": "Where is Ann?", "target_new": "Bonn", "ground_truth": "Rome",
           "rephrase_prompt": "Ann is where?"}  # fmt: skip
    (fact,) = load_facts([row], notes=notes)
    assert not fact.is_question and "is a question" in notes[-1]


def test_tofu_perturbed() -> None:
    row = {"question": "Who is Ann Lee?", "answer": "Ann Lee is a poet.",
           "paraphrased_question": "Ann Lee is who?",
           "paraphrased_answer": "x", "perturbed_answer": ["y"]}  # fmt: skip
    (fact,) = load_facts([row])
    assert fact.subject == "Ann Lee" and fact.paraphrases == ("Ann Lee is who?",)


def test_rwku() -> None:
    base = {"subject": "Ann Lee", "level": "1", "type": "cloze"}
    rows = [
        base | {"query": "Ann Lee lives in ___ .", "answer": "Rome"},
        base | {"query": "Who is Ann Lee?", "answer": "a poet"},
        base | {"query": "The poet of Old Town won ___", "answer": "a prize"},
        base | {"query": "The ___ won", "answer": "poet"},
        base | {"query": "Ann Lee lives in ___ still", "answer": "Italy"},
        base | {"query": "Bo Ek knows ___", "answer": "Ann", "neighbor": "Bo Ek"},
    ]
    notes: list[str] = []
    facts = load_facts(rows, notes=notes)
    assert [f.prompt for f in facts] == [
        "Ann Lee lives in",
        "Who is Ann Lee?",
        "The poet of Old Town won",
        "Bo Ek knows",
    ]
    assert [f.is_question for f in facts] == [False, True, False, False]
    assert [f.subject for f in facts] == ["Ann Lee", "Ann Lee", "Old Town", "Bo Ek"]
    assert [f.subject_found for f in facts] == [False, False, True, False]
    said = " ".join(notes)
    assert "facts[3]: skipped" in said and "facts[4]: contradicts" in said and "facts[2]: the labelled" in said


def test_columns_in_other_case_and_misspelled() -> None:
    notes: list[str] = []
    (fact,) = load_facts([{"Question": "Who?", "Answer": "Ann", "paraphases": ["x"]}], notes=notes)
    assert fact.answer == "Ann"
    assert notes == ["facts: ignored columns: 'paraphases' (did you mean 'paraphrases'?)."]


# hub ids and local copies


def test_local_copies_of_hub_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "tofu"
    folder.mkdir()
    rows = [{"question": "Who is Ann?", "answer": "A."}, {"question": "Who is Ann?", "answer": "B."}]
    write_facts(folder, "forget01.json", rows)
    for root in (folder, tmp_path):
        notes: list[str] = []
        assert len(load_facts("locuslab/TOFU:forget01", data_root=root, notes=notes)) == 1
        assert "contradicts" in notes[0]
    assert len(load_facts(f"{folder}:forget01")) == 1
    assert "no split 'test'" in str(_notes("locuslab/TOFU:forget01:test", data_root=folder))
    assert "It has forget01.json" in problems_of("locuslab/TOFU:forget02", data_root=folder)[0]
    assert "no such folder" in problems_of("locuslab/TOFU:forget01", data_root=tmp_path / "no")[0]


def _notes(source: Any, **options: Any) -> list[str]:
    notes: list[str] = []
    load_facts(source, notes=notes, **options)
    return notes


class _Hub:
    """Stands in for the datasets library."""

    def __init__(self, splits: dict[str, list[dict[str, Any]]]) -> None:
        self.splits = splits
        self.asked: list[tuple[str, str | None]] = []

    def load_dataset(self, name: str, config: str | None) -> dict[str, list[dict[str, Any]]]:
        self.asked.append((name, config))
        if not self.splits:
            raise ConnectionError("no network\nmore")
        return self.splits


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub({"test": [fact_row()]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert "read its only one, 'test'" in _notes("some/Data:part")[0]
    assert hub.asked == [("some/Data", "part")]
    hub.splits = {"test": [fact_row()], "dev": [fact_row()]}
    assert len(load_facts("some/Data:part:dev")) == 1
    assert "It has: test, dev" in problems_of("some/Data")[0]
    hub.splits = {}
    (problem,) = problems_of("some/Data:part")
    assert "no network" in problem and "--data-root" in problem and "\n" not in problem
