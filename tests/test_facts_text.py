"""Generic text: the shipped documents in two parts, files, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from editunlearn.errors import InputError
from editunlearn.facts.text import HELDOUT_EVERY, check_source, documents


def test_the_shipped_text_has_two_parts_that_share_nothing() -> None:
    statistics, heldout = list(documents("general")), list(documents("general", "heldout"))
    assert statistics and heldout and not set(statistics) & set(heldout)
    assert len(heldout) == (len(statistics) + len(heldout)) // HELDOUT_EVERY
    assert all(text.strip() for text in statistics + heldout)


def test_plain_files_are_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("One {}\nstill one.\n\n\n Zwei: Straße \n\n", encoding="utf-8")
    assert list(documents(str(path))) == ["One {}\nstill one.", "Zwei: Straße"]


def test_jsonl_files(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"text": "数学\n\nb"}) + "\n\n" + json.dumps({"text": "c", "id": 1}), encoding="utf-8")
    assert list(documents(str(path))) == ["数学\n\nb", "c"]


@pytest.mark.parametrize("line", ['{"txt": "a"}', "[1]", "{", '"text"'])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        list(documents(str(path)))
    assert str(caught.value) == f"{path}:2: not a JSON object with a 'text' field."


@pytest.mark.parametrize("source", ["wikitext", "no/such.txt", "a:b", "a:b:c"])
def test_unknown_sources(source: str) -> None:
    with pytest.raises(InputError, match="is not a file. Give 'general'"):
        check_source(source)


def test_check_source_reads_no_hub_dataset(tmp_path: Path) -> None:
    for source in ("general", "none", "owner/set:config:train", "owner/set::"):
        check_source(source)
    path = tmp_path / "own.jsonl"
    path.write_text("nothing")
    with pytest.raises(InputError, match=":1: not a JSON object"):
        check_source(str(path))


def test_what_is_wrong_with_a_text_is_found_before_it_is_used(tmp_path: Path) -> None:
    def problem(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            check_source(str(tmp_path / name))
        return str(error.value)

    assert "has no text in it" in problem("empty.txt", b"") and "has no text" in problem("blank.jsonl", b"\n \n")
    assert "latin.txt: not UTF-8 (byte 3)" in problem("latin.txt", "caf\u00e9".encode("latin-1"))
    assert "late.jsonl:2: not a JSON object" in problem("late.jsonl", b'{"text": "one"}\n{"txt": "two"}\n')


def test_marks_and_separators_do_not_break_lines(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "one\u2028two"}, ensure_ascii=False).encode())
    check_source(str(path))
    assert list(documents(str(path))) == ["one\u2028two"]
