"""Read facts. Every problem of a source is found and reported at once, before any model is loaded."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from editunlearn.errors import InputError
from editunlearn.facts.formats import Row, Rows
from editunlearn.facts.records import Fact
from editunlearn.facts.rows import Findings, to_fact
from editunlearn.facts.sources import read_rows

Source = str | os.PathLike[str] | Sequence[Mapping[str, object]]
Conflicts = Literal["error", "first"]


def load_facts(
    source: Source,
    *,
    data_root: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
    notes: list[str] | None = None,
    conflicts: Conflicts = "error",
) -> list[Fact]:
    """Load facts from a file, a local copy of a data set, a hub id, or records already in memory.

    - Files: JSONL, JSON (a list, one object, or one object a line), CSV, TSV, Parquet. UTF-8, with or
      without BOM.
    - ``"locuslab/TOFU:forget01"`` or ``"owner/name:config:split"`` through ``datasets``; ``"FOLDER:CONFIG"``
      locally.
    - Only ``answer`` and one of ``prompt`` and ``question`` are required. A missing subject is found in the
      text (``Fact.subject_found``); a missing id becomes ``fact-<line>`` (the place in the list for JSON
      lists and Parquet).
    - ``{}`` in a prompt marks the subject's place. Without it the subject's last occurrence in the prompt
      counts, whole words before parts of words.
    - A prompt with a blank (``___``) ends before it. A row with nothing before the blank is skipped with a
      note.
    - Without a prompt, ``Fact.prompt`` is the question and ``Fact.is_question`` True.
    - Text is stripped of surrounding space; nothing else about it is changed.

    Args:
        source: where the facts are.
        data_root: folder with local copies of hub datasets.
        split: split of a hub dataset, unless the id names one.
        limit: read only that many facts; what rows after them say is not checked.
        notes: list that receives remarks a user should see (columns read under other names, repeats, odd
            rows).
        conflicts: what to do when one prompt comes with different answers. ``"error"`` reports both places;
            ``"first"`` keeps the first and notes it. Hub datasets, which their users cannot mend, and RWKU's
            clozes are always "first".
            An answer that is only the beginning of the other ("Jeet", "Jeet Kune Do") is no conflict: it
            becomes an alias.

    Raises:
        InputError: the source is missing, unreadable or empty, or some rows are not facts; lists all of them.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit has to be at least 1, not {limit}.")
    name, read = _rows(source, data_root, split)
    findings = Findings()
    facts = _Collector(findings, "first" if read.published else conflicts)
    for row in read.rows:
        if limit is not None and len(facts.kept) >= limit:
            break
        fact = to_fact(row, findings)
        if fact is not None:
            facts.add(fact, row)
    if read.problems or findings.problems:
        raise InputError([*read.problems, *findings.messages()])
    if not facts.kept:
        raise InputError(f"{name}: no facts in it. {' '.join(findings.notes(name))}".rstrip())
    if notes is not None:
        notes.extend(read.notes + findings.notes(name))
    return facts.kept


def _rows(source: Source, data_root: str | Path | None, split: str) -> tuple[str, Rows]:
    if isinstance(source, str | os.PathLike):
        path = source if isinstance(source, str) else Path(source)
        return str(path), read_rows(path, data_root=data_root, split=split)
    found = Rows()
    for number, data in enumerate(source, start=1):
        where = f"facts[{number - 1}]"
        if isinstance(data, Mapping):
            found.rows.append(Row(where, number, data))
        else:
            found.problems.append(f"{where}: expected a mapping, got {type(data).__name__}.")
    return "facts", found


class _Collector:
    """Keeps the facts that are neither repeats nor contradictions of earlier ones."""

    def __init__(self, findings: Findings, conflicts: Conflicts) -> None:
        self.kept: list[Fact] = []
        self._findings = findings
        self._conflicts = conflicts
        self._by_id: dict[str, str] = {}
        self._by_prompt: dict[str, tuple[int, str]] = {}  # comparable prompt -> (place in kept, where it was)

    def add(self, fact: Fact, row: Row) -> None:
        key = comparable(fact.prompt)
        if key in self._by_prompt:
            self._merge(fact, row, *self._by_prompt[key])
            return
        if fact.id in self._by_id:
            made = "" if "id" in row.data else " (made from its place; give it an id of its own)"
            self._findings.problems.append(
                (row.where, f'id "{fact.id}"{made} is already that of {self._by_id[fact.id]}')
            )
        self._by_id.setdefault(fact.id, row.where)
        self._by_prompt[key] = (len(self.kept), row.where)
        self.kept.append(fact)

    def _merge(self, fact: Fact, row: Row, place: int, where: str) -> None:
        """Deal with a second fact of the same prompt."""
        first = self.kept[place]
        old, new = comparable(first.answer), comparable(fact.answer)
        if fact.target is not None and first.target is not None and fact.target != first.target:
            what = f'target "{fact.target}" contradicts "{first.target}" at {where}'
            self._findings.problems.append((row.where, f'{what} for the same prompt "{fact.prompt}"; keep one'))
        elif new == old or new in map(comparable, first.aliases):
            self._findings.warnings["says the same as an earlier row; the first is kept"].append(row.where)
        elif _shortens(new, old) or _shortens(old, new):
            self.kept[place] = replace(first, aliases=(*first.aliases, fact.answer))
            self._findings.warnings["same prompt as an earlier row; its answer became an alias"].append(row.where)
        elif self._conflicts == "first" or "query" in row.data:
            # Cutting RWKU's clozes at their blank makes prompts alike that were not.
            self._findings.warnings["contradicts an earlier row; the first is kept"].append(row.where)
        else:
            what = f'answer "{fact.answer}" contradicts "{first.answer}" at {where}'
            why = f'for the same prompt "{fact.prompt}"; keep one'
            self._findings.problems.append((row.where, f"{what} {why}"))


def comparable(text: str) -> str:
    """Text for comparisons: composed, without case, extra space or a closing full stop."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).casefold().strip().rstrip(".").rstrip()


def _shortens(short: str, long: str) -> bool:
    """Whether ``long`` begins with the whole words of ``short``: both then start with the same tokens."""
    return long.startswith(short) and not long[len(short) : len(short) + 1].isalnum()
