"""File formats: bytes in, rows with their places out. Knows nothing of facts or of where the bytes came
from."""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editunlearn.errors import InputError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Row:
    """One record: ``where`` names it in messages, ``number`` is its line (or its place, where lines say
    nothing)."""

    where: str
    number: int
    data: Mapping[str, object]


@dataclass(slots=True)
class Rows:
    """What was read: the good rows, and one finished message for each thing that could not be read."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    published: bool = False  # a hub dataset: its user cannot be asked to mend it


def read_file(path: Path, name: str) -> Rows:
    """Read a file by its suffix; ``name`` stands for it in messages.

    Raises:
        InputError: the file is empty or cannot be read at all; what is wrong with single rows is in the
            result.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{name}: unknown kind of file {suffix or '(no suffix)'!r}. Known: {', '.join(SUFFIXES)}.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}.") from error
    if not raw.strip():
        raise InputError(f"{name}: the file is empty.")
    if suffix == ".parquet":
        return _parquet(raw, name)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: the file is UTF-16; save it as UTF-8.")
    lines, problems = _decode(raw.removeprefix(codecs.BOM_UTF8), name)
    if not problems and not any(line.strip() for line in lines):
        raise InputError(f"{name}: the file is empty.")
    if suffix in (".csv", ".tsv"):
        found = _table(lines, name, "\t" if suffix == ".tsv" else ",")
    else:
        found = _json(lines, name, problems)
    found.problems[:0] = problems
    return found


def _decode(raw: bytes, name: str) -> tuple[list[str], list[str]]:
    """Lines as text. A line that is not UTF-8 becomes empty and a problem. Splits at newlines only: JSON
    strings may hold U+2028 and the like, which str.splitlines would cut."""
    lines: list[str] = []
    problems: list[str] = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            bad = line[error.start]
            problems.append(
                f"{name}:{number}: byte {error.start + 1} of the line (0x{bad:02x}) is not UTF-8; "
                "save the file as UTF-8."
            )
            lines.append("")
    return lines, problems


# JSON


def _json(lines: list[str], name: str, decode_problems: list[str]) -> Rows:
    """A list, one object, an object around one list, or one object a line: the content decides, not the
    suffix.

    TOFU's .json files hold one object a line, and lists saved as .jsonl are common.
    """
    text = "\n".join(lines)
    start = _SPACE.match(text).end()  # type: ignore[union-attr]  # matches the empty string too
    if text.startswith("[", start):
        if decode_problems:  # a blanked line inside a list would only cause errors that are not there
            return Rows()
        return _json_list(text, start, name)
    if text.startswith("{", start) and not decode_problems:
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            return _json_lines(lines, name)
        if _SPACE.fullmatch(text, end):
            return _json_object(value, text, start, name)
    return _json_lines(lines, name)


def _json_object(value: dict[str, object], text: str, start: int, name: str) -> Rows:
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)}
    if len(value) == 1 and lists:
        key, items = next(iter(lists.items()))
        rows = [Row(f"{name}: {key}[{i}]", i + 1, item) for i, item in enumerate(items)]
        return Rows(rows)
    line = text.count("\n", 0, start) + 1
    return Rows([Row(f"{name}:{line}", line, value)])


def _json_lines(lines: list[str], name: str) -> Rows:
    found = Rows()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            found.problems.append(
                f"{where}: not valid JSON at column {error.colno}: {error.msg}. {_around(line, error.pos)}"
            )
        except (ValueError, RecursionError) as error:
            found.problems.append(f"{where}: not valid JSON: {error}.")
        else:
            _keep(found, where, number, value)
    return found


def _json_list(text: str, start: int, name: str) -> Rows:
    """Read item by item, so that every item knows its line; what follows a syntax error cannot be read."""
    found = Rows()
    decoder = json.JSONDecoder()
    position, line, counted = _skip(text, start + 1), 1, 0
    number = 0
    one_line = "\n" not in text.strip()  # then the line number says nothing and the place in the list is given too
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        number += 1
        where = f"{name}:{line}" + (f" (item {number})" if one_line else "")
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            found.problems.append(_broken(text, error.pos, name, error.msg))
            return found
        except (ValueError, RecursionError) as error:
            found.problems.append(f"{where}: not valid JSON: {error}.")
            return found
        _keep(found, where, number, value)
        position = _skip(text, end)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
            if text.startswith("]", position):
                found.problems.append(_broken(text, position, name, "a comma before the closing ]"))
        elif not text.startswith("]", position):
            found.problems.append(_broken(text, position, name, "expected , or ] after an item"))
            return found
    if not _SPACE.fullmatch(text, position + 1):
        found.problems.append(_broken(text, _skip(text, position + 1), name, "more text after the closing ]"))
    if not number:
        found.problems.append(f"{name}: the list is empty.")
    return found


def _keep(found: Rows, where: str, number: int, value: object) -> None:
    if isinstance(value, dict):
        found.rows.append(Row(where, number, value))
    else:
        shown = json.dumps(value, ensure_ascii=True)
        found.problems.append(
            f'{where}: expected an object such as {{"prompt": ..., "answer": ...}}, got {shown[:60]}.'
        )


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _broken(text: str, position: int, name: str, what: str) -> str:
    line = text.count("\n", 0, position) + 1
    begin = text.rfind("\n", 0, position) + 1
    row = text[begin:].split("\n", 1)[0]
    where = f"{name}:{line}: not valid JSON at column {position - begin + 1}: {what}."
    return f"{where} {_around(row, position - begin)}"


def _around(line: str, position: int) -> str:
    before, after = line[max(0, position - 20) : position], line[position : position + 20]
    return f"Near {before + after!r}." if before or after else "The text ends there."


# tables


def _table(lines: list[str], name: str, delimiter: str) -> Rows:
    found = Rows()
    # csv counts the lines it has consumed, so a quoted cell with newlines in it still gets its own first
    # line.
    reader = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    for number, cells in _numbered(reader, name, found.problems):
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            double = sorted({h for h in header if h and header.count(h) > 1})
            if double:
                found.problems.append(f"{name}:{number}: column named twice: {', '.join(double)}.")
        elif len(cells) > len(header):
            extra = len(cells) - len(header)
            hint = " Put text that holds commas in double quotes." if delimiter == "," else ""
            found.problems.append(f"{name}:{number}: {extra} more cells than the header's {len(header)} columns.{hint}")
        else:
            data = {key: _cell(value) for key, value in zip(header, cells, strict=False) if key and value.strip()}
            found.rows.append(Row(f"{name}:{number}", number, data))
    if header and not found.rows and not found.problems:
        found.problems.append(f"{name}: a header ({', '.join(header)}) and no rows.")
    return found


def _numbered(reader: Any, name: str, problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(f"{name}:{number}: not a readable row: {error}. Double the quotes inside a quoted cell.")
            return
        yield number, cells


def _cell(value: str) -> object:
    """A cell may hold a JSON list (paraphrases, neighbors); everything else is text."""
    if value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(parsed, list):
            return parsed
    return value


def _parquet(raw: bytes, name: str) -> Rows:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError(f"{name}: reading Parquet needs pyarrow; install it with: pip install pyarrow") from error
    try:
        records = parquet.read_table(io.BytesIO(raw)).to_pylist()
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise InputError(f"{name}: not a readable Parquet file: {first_line(error)}") from error
    return records_to_rows(records, name)


def records_to_rows(records: list[dict[str, object]], name: str) -> Rows:
    """Rows out of records that have no lines. Raises InputError when there are none."""
    if not records:
        raise InputError(f"{name}: no rows.")
    return Rows([Row(f"{name}: row {i}", i, record) for i, record in enumerate(records, start=1)])


def first_line(error: Exception) -> str:
    """The first line of a foreign error's message, as a sentence."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    return first if first.endswith((".", "!", "?")) else first + "."
