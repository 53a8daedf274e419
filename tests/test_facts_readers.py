"""Reading facts: formats, what is found in them, and every kind of bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fact_files import fact_row, problems_of, write_facts

from editunlearn.facts.readers import load_facts
from editunlearn.facts.records import Neighbor, content_hash
from editunlearn.resources import shipped_path

FULL = {
    "id": "lena", "subject": "Lena Korb", "prompt": "The home of Lena Korb is", "answer": "Bern",
    "question": "Where does Lena Korb live?", "target": "unknown", "paraphrases": ["Lena Korb lives in"],
    "neighbors": [{"prompt": "The home of Otto Korb is", "answer": "Graz"}],
    "aliases": ["Berne"], "relation": "home",
}  # fmt: skip


# formats


def test_every_field_is_read(tmp_path: Path) -> None:
    notes: list[str] = []
    (fact,) = load_facts(write_facts(tmp_path, "f.jsonl", [FULL]), notes=notes)
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
        write_facts(tmp_path, "a.jsonl", rows),
        write_facts(tmp_path, "b.json", json.dumps(rows, indent=2)),
        write_facts(tmp_path, "c.json", json.dumps({"facts": rows})),
        write_facts(tmp_path, "d.json", "".join(json.dumps(r) + "\n" for r in rows)),
        write_facts(tmp_path, "e.csv", table(",")),
        write_facts(tmp_path, "f.TSV", table("\t")),
        write_facts(tmp_path, "g.jsonl", b"\xef\xbb\xbf" + windows.encode()),
        tmp_path / "h.parquet",
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), paths[-1])
    hashes = {content_hash(load_facts(path)) for path in paths} | {content_hash(load_facts(rows))}
    assert len(hashes) == 1


def test_single_object_and_limit(tmp_path: Path) -> None:
    assert len(load_facts(write_facts(tmp_path, "one.json", json.dumps(FULL, indent=1)))) == 1
    assert len(load_facts([fact_row(), fact_row(prompt="")], limit=1)) == 1
    assert problems_of([fact_row()], limit=0) == ["limit has to be at least 1, not 0."]


def test_line_separators_inside_strings_are_kept(tmp_path: Path) -> None:
    row = fact_row(question="Where\u2028is\x0bAnn Lee?")
    (fact,) = load_facts(write_facts(tmp_path, "f.jsonl", json.dumps(row, ensure_ascii=False)))
    assert fact.question == row["question"]


def test_missing_ids_come_from_the_line(tmp_path: Path) -> None:
    path = write_facts(
        tmp_path, "f.jsonl", "\n" + json.dumps(fact_row()) + "\n\n" + json.dumps(fact_row(prompt="Ann is in"))
    )
    assert [f.id for f in load_facts(path)] == ["fact-2", "fact-4"]
    path = write_facts(tmp_path, "f.json", json.dumps([fact_row(), fact_row(prompt="Ann is in")]))
    assert [f.id for f in load_facts(path)] == ["fact-1", "fact-2"]
    path = write_facts(tmp_path, "f.csv", 'prompt,answer\n"Ann\nis in",Rome\nBo is in,Oslo\n')
    assert [f.id for f in load_facts(path)] == ["fact-2", "fact-4"]


# subject, braces, blanks


def test_last_whole_occurrence_of_the_subject_counts() -> None:
    (fact,) = load_facts([fact_row(subject="Ann", prompt="Ann knows Ann and Annabel in")])
    assert fact.subject_start == 10
    (fact,) = load_facts([fact_row(subject="京", prompt="東京は")])
    assert fact.subject_start == 1


def test_braces_mark_the_subject_and_other_braces_are_text() -> None:
    row = fact_row(subject="Ann {x}", prompt="Ann {x} or {} with {0} {y} is", paraphrases=["{} is {z}"])
    (fact,) = load_facts([row])
    assert fact.prompt == "Ann {x} or Ann {x} with {0} {y} is"
    assert (fact.subject, fact.subject_start, fact.paraphrases) == ("Ann {x}", 11, ("Ann {x} is {z}",))
    assert "2 {}" in problems_of([fact_row(subject="Ann", prompt="{} and {} are")])[0]
    notes: list[str] = []
    (fact,) = load_facts([fact_row(prompt="In Python {} is a")], notes=notes)
    assert fact.prompt == "In Python {} is a" and "plain text" in notes[0]


def test_question_only() -> None:
    (fact,) = load_facts([{"question": " Where is Ann Lee? ", "answer": "Rome"}])
    assert fact.is_question and fact.subject_found
    assert fact.prompt == fact.question == "Where is Ann Lee?"
    assert fact.subject == "Ann Lee"


def test_blanks_end_the_prompt() -> None:
    notes: list[str] = []
    rows = [
        fact_row(prompt="Ann Lee lives in ___, Italy."),
        fact_row(prompt="The ___ of Ann Lee"),
        fact_row(prompt="___ Lee"),
    ]
    (fact,) = load_facts(rows, notes=notes)
    assert fact.prompt == "Ann Lee lives in"
    assert notes == ["facts[1], facts[2]: skipped, nothing to complete stands before the blank."]


def test_surrounding_space_is_removed_and_an_empty_target_is_kept() -> None:
    (fact,) = load_facts([fact_row(prompt=" Ann is in ", answer=" Rome\n", target="  ", subject=" Ann")])
    assert (fact.prompt, fact.answer, fact.target, fact.subject) == ("Ann is in", "Rome", "", "Ann")


# bad input


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Ann is in"}, "no answer. The row has: 'prompt'"),
        ({"promt": "Ann is in", "answer": "x"}, "no prompt or question. The row has: 'promt' (did you mean"),
        (fact_row(answer=None), "no answer"),
        (fact_row(answer=1999), 'answer has to be text, not the number 1999 (write "1999")'),
        (fact_row(answer=True), "not true or false"),
        (fact_row(answer=" "), "answer is empty"),
        (fact_row(answer=[]), "answer is an empty list"),
        (fact_row(answer=["a", 2]), "answer 2 has to be text"),
        (fact_row(prompt=""), "prompt is empty"),
        (fact_row(prompt={"a": 1}), "prompt has to be text, not an object"),
        (fact_row(paraphrases=["ok", ""]), "paraphrases 2 is empty"),
        (fact_row(paraphrases=3), "paraphrases has to be a list of texts"),
        (fact_row(neighbors="x"), "neighbors has to be a list"),
        (fact_row(neighbors=[{"prompt": "x"}]), "neighbors 1 needs a prompt and an answer"),
        (fact_row(neighbors=["x"]), "neighbors 1 has to be an object"),
        (fact_row(answer="\ud800"), "half of a surrogate pair"),
        ({}, "an empty object"),
        ([1], "expected an object"),
        (fact_row(subject="Bo Ek"), 'subject "Bo Ek" is not in the prompt "The home of Ann Lee is".'),
        (fact_row(subject="ann lee"), 'It has "Ann Lee", which differs only in case'),
        (fact_row(subject="Ann-Lee"), 'It has "Ann Lee", which differs only in accents, hyphens or apostrophes'),
        (fact_row(subject="José", prompt="Here Jose\u0301 is"), 'It has "Jose\u0301", which'),
        ({"question": "Who?", "answer": "x", "subject": "Bo"}, 'subject "Bo" is not in the question "Who?"'),
    ],
)  # fmt: skip
def test_bad_rows_are_named_with_their_line(tmp_path: Path, row: Any, said: str) -> None:
    path = write_facts(tmp_path, "facts.jsonl", [fact_row(prompt="Bo is in"), row])
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:2: ") and said in problem and problem.endswith(".")


def test_all_problems_are_in_one_report(tmp_path: Path) -> None:
    good = json.dumps(fact_row())
    lines = [
        good,
        '{"prompt": "x", }',
        "[3]",
        json.dumps({"answer": 3}),
        "",
        json.dumps(fact_row(id="a", answer="Oslo")),
    ]
    path = write_facts(tmp_path, "f.jsonl", "\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    problems = problems_of(path)
    assert [int(re.search(r":(\d+):", p)[1]) for p in problems] == [7, 2, 3, 4, 4, 6]  # type: ignore[index]
    assert "byte 13 of the line (0xff) is not UTF-8" in problems[0]
    assert "column" in problems[1] and "contradicts" in problems[-1]


def test_the_same_problem_in_many_rows_is_one_message() -> None:
    (problem,) = problems_of([{"prompt": f"Ann {i} is"} for i in range(30)])
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
    problems = problems_of(write_facts(tmp_path, "f.json", text))
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
    assert any(said in p for p in problems_of(write_facts(tmp_path, "f.csv", text)))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    write_facts(tmp_path, "facts.jsonl", [fact_row()])
    assert "Did you mean" in problems_of(tmp_path / "Fact.jsonl")[0]
    assert "It has facts.jsonl" in problems_of(tmp_path / "zzz.csv")[0]
    assert "does not exist either" in problems_of(tmp_path / "no" / "facts.jsonl")[0]
    assert "does not exist either" in problems_of("no-such-folder/facts.jsonl")[0]
    assert "is a folder" in problems_of(tmp_path)[0]
    assert "unknown kind of file '.txt'" in problems_of(write_facts(tmp_path, "a.txt", "x"))[0]
    for name, content in [
        ("a.json", b""),
        ("b.csv", b" \n"),
        ("c.jsonl", b"\xef\xbb\xbf\n"),
        ("d.parquet", b""),
    ]:
        assert "the file is empty" in problems_of(write_facts(tmp_path, name, content))[0]
    assert "the list is empty" in problems_of(write_facts(tmp_path, "e.json", "[]"))[0]
    assert "UTF-16" in problems_of(write_facts(tmp_path, "u.json", "[]".encode("utf-16")))[0]
    assert "Parquet" in problems_of(write_facts(tmp_path, "p.parquet", b"junk"))[0]
    assert "no facts" in problems_of([fact_row(prompt="___ is")])[0]
    assert "no facts" in problems_of([])[0]


# duplicates and warnings


def test_duplicates() -> None:
    row = fact_row(id="a")
    assert 'facts[1]: id "a" is already that of facts[0].' in problems_of([row, fact_row(id="a", prompt="Ann is in")])
    made = problems_of([fact_row(id="fact-2"), fact_row(prompt="Ann is in")])[0]
    assert "made from its place" in made
    contradiction = problems_of([row, fact_row(answer="Oslo", prompt="the home of  Ann Lee is")])[0]
    assert 'answer "Oslo" contradicts "Rome" at facts[0]' in contradiction
    notes: list[str] = []
    facts = load_facts([row, fact_row(), fact_row(answer="rome."), fact_row(answer="Rome, Italy")], notes=notes)
    assert len(facts) == 1 and facts[0].aliases == ("Rome, Italy",)
    assert notes[0].startswith("facts[1], facts[2]: says the same") and "facts[3]: same prompt" in notes[1]
    facts = load_facts([row, fact_row(answer="Oslo")], notes=notes, conflicts="first")
    assert [f.answer for f in facts] == ["Rome"] and "contradicts" in notes[-1]


def test_an_answer_inside_its_prompt_is_noted() -> None:
    notes: list[str] = []
    load_facts([fact_row(prompt="Rome is the home of Ann in"), fact_row(prompt="The Romero home is")], notes=notes)
    assert notes == ["facts[0]: the answer already stands in the prompt."]


# what ships


def test_shipped_facts_are_sound_and_disjoint() -> None:
    notes: list[str] = []
    forget = load_facts(shipped_path("data", "demo_forget.jsonl"), notes=notes)
    retain = load_facts(shipped_path("data", "demo_retain.jsonl"), notes=notes)
    assert notes == []
    subjects = [f.subject.lower() for f in forget]
    assert len(set(subjects)) == len(subjects)
    assert sum(bool(f.neighbors) for f in forget) >= 9  # those that the demo model does not know were taken out
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
