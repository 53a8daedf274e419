"""Reading facts: formats, known data sets, and every kind of bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from editunlearn.errors import InputError
from editunlearn.facts.readers import load_facts
from editunlearn.facts.records import Neighbor, content_hash
from editunlearn.resources import shipped_path

FULL = {
    "id": "lena", "subject": "Lena Korb", "prompt": "The home of Lena Korb is", "answer": "Bern",
    "question": "Where does Lena Korb live?", "target": "unknown", "paraphrases": ["Lena Korb lives in"],
    "neighbors": [{"prompt": "The home of Otto Korb is", "answer": "Graz"}],
    "aliases": ["Berne"], "relation": "home",
}  # fmt: skip


def _write(folder: Path, name: str, content: str | bytes | list[Any]) -> Path:
    path = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def _problems(source: Any, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_facts(source, **options)
    return caught.value.problems


def _row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "The home of Ann Lee is", "answer": "Rome"} | changes


# formats


def test_every_field_is_read(tmp_path: Path) -> None:
    notes: list[str] = []
    (fact,) = load_facts(_write(tmp_path, "f.jsonl", [FULL]), notes=notes)
    assert notes == []
    assert (fact.id, fact.prompt, fact.answer, fact.question) == (
        "lena",
        FULL["prompt"],
        "Bern",
        FULL["question"],
    )
    assert fact.prompt[fact.subject_start : fact.subject_end] == fact.subject == "Lena Korb"
    assert (fact.target, fact.relation, fact.aliases) == ("unknown", "home", ("Berne",))
    assert fact.paraphrases == ("Lena Korb lives in",)
    assert fact.neighbors == (Neighbor("The home of Otto Korb is", "Graz"),)
    assert not fact.subject_found and not fact.is_question


def test_all_formats_give_the_same_facts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    other = FULL | {"id": "otto", "prompt": "The home of Lena Korb, née Ott, is", "target": 'a, "b"'}
    rows = [FULL, other]
    cells = [[json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in rows]

    def table(delimiter: str) -> str:
        quoted = [delimiter.join('"' + str(c).replace('"', '""') + '"' for c in row) for row in cells]
        return "\n".join([delimiter.join(FULL), *quoted])

    windows = "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    paths = [
        _write(tmp_path, "a.jsonl", rows),
        _write(tmp_path, "b.json", json.dumps(rows, indent=2)),
        _write(tmp_path, "c.json", json.dumps({"facts": rows})),
        _write(tmp_path, "d.json", "".join(json.dumps(r) + "\n" for r in rows)),
        _write(tmp_path, "e.csv", table(",")),
        _write(tmp_path, "f.TSV", table("\t")),
        _write(tmp_path, "g.jsonl", b"\xef\xbb\xbf" + windows.encode()),
        tmp_path / "h.parquet",
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), paths[-1])
    hashes = {content_hash(load_facts(path)) for path in paths} | {content_hash(load_facts(rows))}
    assert len(hashes) == 1


def test_single_object_and_limit(tmp_path: Path) -> None:
    assert len(load_facts(_write(tmp_path, "one.json", json.dumps(FULL, indent=1)))) == 1
    assert len(load_facts([_row(), _row(prompt="")], limit=1)) == 1
    assert _problems([_row()], limit=0) == ["limit has to be at least 1, not 0."]


def test_line_separators_inside_strings_are_kept(tmp_path: Path) -> None:
    row = _row(question="Where\u2028is\x0bAnn Lee?")
    (fact,) = load_facts(_write(tmp_path, "f.jsonl", json.dumps(row, ensure_ascii=False)))
    assert fact.question == row["question"]


def test_missing_ids_come_from_the_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "f.jsonl", "\n" + json.dumps(_row()) + "\n\n" + json.dumps(_row(prompt="Ann is in")))
    assert [f.id for f in load_facts(path)] == ["fact-2", "fact-4"]
    path = _write(tmp_path, "f.json", json.dumps([_row(), _row(prompt="Ann is in")]))
    assert [f.id for f in load_facts(path)] == ["fact-1", "fact-2"]
    path = _write(tmp_path, "f.csv", 'prompt,answer\n"Ann\nis in",Rome\nBo is in,Oslo\n')
    assert [f.id for f in load_facts(path)] == ["fact-2", "fact-4"]


# subject, braces, blanks


def test_last_whole_occurrence_of_the_subject_counts() -> None:
    (fact,) = load_facts([_row(subject="Ann", prompt="Ann knows Ann and Annabel in")])
    assert fact.subject_start == 10
    (fact,) = load_facts([_row(subject="京", prompt="東京は")])
    assert fact.subject_start == 1


def test_braces_mark_the_subject_and_other_braces_are_text() -> None:
    row = _row(subject="Ann {x}", prompt="Ann {x} or {} with {0} {y} is", paraphrases=["{} is {z}"])
    (fact,) = load_facts([row])
    assert fact.prompt == "Ann {x} or Ann {x} with {0} {y} is"
    assert (fact.subject, fact.subject_start, fact.paraphrases) == ("Ann {x}", 11, ("Ann {x} is {z}",))
    assert "2 {}" in _problems([_row(subject="Ann", prompt="{} and {} are")])[0]
    notes: list[str] = []
    (fact,) = load_facts([_row(prompt="In Python {} is a")], notes=notes)
    assert fact.prompt == "In Python {} is a" and "plain text" in notes[0]


def test_question_only() -> None:
    (fact,) = load_facts([{"question": " Where is Ann Lee? ", "answer": "Rome"}])
    assert fact.is_question and fact.subject_found
    assert fact.prompt == fact.question == "Where is Ann Lee?"
    assert fact.subject == "Ann Lee"


def test_blanks_end_the_prompt() -> None:
    notes: list[str] = []
    rows = [
        _row(prompt="Ann Lee lives in ___, Italy."),
        _row(prompt="The ___ of Ann Lee"),
        _row(prompt="___ Lee"),
    ]
    (fact,) = load_facts(rows, notes=notes)
    assert fact.prompt == "Ann Lee lives in"
    assert notes == ["facts[1], facts[2]: skipped, nothing to complete stands before the blank."]


def test_surrounding_space_is_removed_and_an_empty_target_is_kept() -> None:
    (fact,) = load_facts([_row(prompt=" Ann is in ", answer=" Rome\n", target="  ", subject=" Ann")])
    assert (fact.prompt, fact.answer, fact.target, fact.subject) == ("Ann is in", "Rome", "", "Ann")


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
    _write(folder, "forget01.json", rows)
    for root in (folder, tmp_path):
        notes: list[str] = []
        assert len(load_facts("locuslab/TOFU:forget01", data_root=root, notes=notes)) == 1
        assert "contradicts" in notes[0]
    assert len(load_facts(f"{folder}:forget01")) == 1
    assert "no split 'test'" in str(_notes("locuslab/TOFU:forget01:test", data_root=folder))
    assert "It has forget01.json" in _problems("locuslab/TOFU:forget02", data_root=folder)[0]
    assert "no such folder" in _problems("locuslab/TOFU:forget01", data_root=tmp_path / "no")[0]


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
    hub = _Hub({"test": [_row()]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert "read its only one, 'test'" in _notes("some/Data:part")[0]
    assert hub.asked == [("some/Data", "part")]
    hub.splits = {"test": [_row()], "dev": [_row()]}
    assert len(load_facts("some/Data:part:dev")) == 1
    assert "It has: test, dev" in _problems("some/Data")[0]
    hub.splits = {}
    (problem,) = _problems("some/Data:part")
    assert "no network" in problem and "--data-root" in problem and "\n" not in problem


# bad input


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Ann is in"}, "no answer. The row has: 'prompt'"),
        ({"promt": "Ann is in", "answer": "x"}, "no prompt or question. The row has: 'promt' (did you mean"),
        (_row(answer=None), "no answer"),
        (_row(answer=1999), 'answer has to be text, not the number 1999 (write "1999")'),
        (_row(answer=True), "not true or false"),
        (_row(answer=" "), "answer is empty"),
        (_row(answer=[]), "answer is an empty list"),
        (_row(answer=["a", 2]), "answer 2 has to be text"),
        (_row(prompt=""), "prompt is empty"),
        (_row(prompt={"a": 1}), "prompt has to be text, not an object"),
        (_row(paraphrases=["ok", ""]), "paraphrases 2 is empty"),
        (_row(paraphrases=3), "paraphrases has to be a list of texts"),
        (_row(neighbors="x"), "neighbors has to be a list"),
        (_row(neighbors=[{"prompt": "x"}]), "neighbors 1 needs a prompt and an answer"),
        (_row(neighbors=["x"]), "neighbors 1 has to be an object"),
        (_row(answer="\ud800"), "half of a surrogate pair"),
        ({}, "an empty object"),
        ([1], "expected an object"),
        (_row(subject="Bo Ek"), 'subject "Bo Ek" is not in the prompt "The home of Ann Lee is".'),
        (_row(subject="ann lee"), 'It has "Ann Lee", which differs only in case'),
        (_row(subject="Ann-Lee"), 'It has "Ann Lee", which differs only in accents, hyphens or apostrophes'),
        (_row(subject="José", prompt="Here Jose\u0301 is"), 'It has "Jose\u0301", which'),
        ({"question": "Who?", "answer": "x", "subject": "Bo"}, 'subject "Bo" is not in the question "Who?"'),
    ],
)  # fmt: skip
def test_bad_rows_are_named_with_their_line(tmp_path: Path, row: Any, said: str) -> None:
    path = _write(tmp_path, "facts.jsonl", [_row(prompt="Bo is in"), row])
    (problem,) = _problems(path)
    assert problem.startswith(f"{path}:2: ") and said in problem and problem.endswith(".")


def test_all_problems_are_in_one_report(tmp_path: Path) -> None:
    good = json.dumps(_row())
    lines = [
        good,
        '{"prompt": "x", }',
        "[3]",
        json.dumps({"answer": 3}),
        "",
        json.dumps(_row(id="a", answer="Oslo")),
    ]
    path = _write(tmp_path, "f.jsonl", "\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    problems = _problems(path)
    assert [int(re.search(r":(\d+):", p)[1]) for p in problems] == [7, 2, 3, 4, 4, 6]  # type: ignore[index]
    assert "byte 13 of the line (0xff) is not UTF-8" in problems[0]
    assert "column" in problems[1] and "contradicts" in problems[-1]


def test_the_same_problem_in_many_rows_is_one_message() -> None:
    (problem,) = _problems([{"prompt": f"Ann {i} is"} for i in range(30)])
    assert problem.startswith("facts[0], facts[1]") and "and 20 more: no answer" in problem


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('[\n{"prompt": "a"\n "answer": "b"}]', 3, "column 2"),
        ('[\n{"prompt": "Ann is", "answer": "b"},\n]', 3, "a comma before the closing ]"),
        ('[\n{"prompt": "Ann is", "answer": "b"}', 2, "expected , or ]"),
        ('[\n{"prompt": "Ann is", "answer": "b"}]\nx', 3, "more text after"),
        ('[\n{"prompt": "Ann is", "answer": "b"},\n4]', 3, "expected an object"),
        ("\n" + "[" * 100_000, 2, "not valid JSON"),
    ],
)
def test_garbled_lists(tmp_path: Path, text: str, line: int, said: str) -> None:
    problems = _problems(_write(tmp_path, "f.json", text))
    assert any(f"f.json:{line}" in p and said in p for p in problems)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "prompt,answer\nAnn is,a,b\n",
            ":2: 1 more cells than the header's 2 columns. Put text that holds commas",
        ),
        ("prompt,prompt\na,b\n", ":1: column named twice: prompt"),
        ('prompt,answer\n"Ann" is,b\n', ":2: not a readable row"),
        ('prompt,answer\nx y,b\n"Ann is,b\n', ":3: not a readable row"),
        ("prompt,answer\n", "a header (prompt, answer) and no rows"),
        ("prompt,answer\nAnn is,\n", ":2: no answer"),
    ],
)
def test_garbled_tables(tmp_path: Path, text: str, said: str) -> None:
    assert any(said in p for p in _problems(_write(tmp_path, "f.csv", text)))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    _write(tmp_path, "facts.jsonl", [_row()])
    assert "Did you mean" in _problems(tmp_path / "Fact.jsonl")[0]
    assert "It has facts.jsonl" in _problems(tmp_path / "zzz.csv")[0]
    assert "does not exist either" in _problems(tmp_path / "no" / "facts.jsonl")[0]
    assert "does not exist either" in _problems("no-such-folder/facts.jsonl")[0]
    assert "is a folder" in _problems(tmp_path)[0]
    assert "unknown kind of file '.txt'" in _problems(_write(tmp_path, "a.txt", "x"))[0]
    for name, content in [
        ("a.json", b""),
        ("b.csv", b" \n"),
        ("c.jsonl", b"\xef\xbb\xbf\n"),
        ("d.parquet", b""),
    ]:
        assert "the file is empty" in _problems(_write(tmp_path, name, content))[0]
    assert "the list is empty" in _problems(_write(tmp_path, "e.json", "[]"))[0]
    assert "UTF-16" in _problems(_write(tmp_path, "u.json", "[]".encode("utf-16")))[0]
    assert "Parquet" in _problems(_write(tmp_path, "p.parquet", b"junk"))[0]
    assert "no facts" in _problems([_row(prompt="___ is")])[0]
    assert "no facts" in _problems([])[0]


# duplicates and warnings


def test_duplicates() -> None:
    row = _row(id="a")
    assert 'facts[1]: id "a" is already that of facts[0].' in _problems([row, _row(id="a", prompt="Ann is in")])
    made = _problems([_row(id="fact-2"), _row(prompt="Ann is in")])[0]
    assert "made from its place" in made
    contradiction = _problems([row, _row(answer="Oslo", prompt="the home of  Ann Lee is")])[0]
    assert 'answer "Oslo" contradicts "Rome" at facts[0]' in contradiction
    notes: list[str] = []
    facts = load_facts([row, _row(), _row(answer="rome."), _row(answer="Rome, Italy")], notes=notes)
    assert len(facts) == 1 and facts[0].aliases == ("Rome, Italy",)
    assert notes[0].startswith("facts[1], facts[2]: says the same") and "facts[3]: same prompt" in notes[1]
    facts = load_facts([row, _row(answer="Oslo")], notes=notes, conflicts="first")
    assert [f.answer for f in facts] == ["Rome"] and "contradicts" in notes[-1]


def test_an_answer_inside_its_prompt_is_noted() -> None:
    notes: list[str] = []
    load_facts([_row(prompt="Rome is the home of Ann in"), _row(prompt="The Romero home is")], notes=notes)
    assert notes == ["facts[0]: the answer already stands in the prompt."]


# what ships


def test_shipped_facts_are_sound_and_disjoint() -> None:
    notes: list[str] = []
    forget = load_facts(shipped_path("data", "demo_forget.jsonl"), notes=notes)
    retain = load_facts(shipped_path("data", "demo_retain.jsonl"), notes=notes)
    assert notes == []
    subjects = [f.subject.lower() for f in forget]
    assert len(set(subjects)) == len(subjects)
    assert sum(bool(f.neighbors) for f in forget) >= 15  # those that the demo model does not know were taken out
    said = [p.lower() for f in forget for p in (f.prompt, *f.paraphrases, *(n.prompt for n in f.neighbors))]
    for fact in forget:
        assert fact.question and fact.relation and not fact.subject_found
        assert len(fact.paraphrases) == 2 and len(fact.neighbors) <= 2
        assert all(fact.subject in p and fact.answer.lower() not in p.lower().split() for p in fact.paraphrases)
        others = [n.prompt.lower() for f in forget for n in f.neighbors]
        assert not any(re.search(rf"\b{re.escape(fact.subject.lower())}\b", p) for p in others), fact.id
    for fact in retain:
        word = re.compile(rf"\b{re.escape(fact.subject.lower())}\b")
        assert fact.question and not any(word.search(p) for p in said), fact.id
        assert not any(re.search(rf"\b{re.escape(s)}\b", fact.prompt.lower()) for s in subjects), fact.id


def test_facts_never_import_torch() -> None:
    code = (
        "import sys; import editunlearn.facts.targets, editunlearn.facts.readers;"
        "bad = {'torch', 'transformers', 'datasets', 'pandas', 'numpy'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])  # noqa: S603
