"""Finds results files and puts what belongs together side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editunlearn.errors import InputError
from editunlearn.evaluation import results
from editunlearn.evaluation.open_unlearning import ANY, EVAL_FILE
from editunlearn.evaluation.reference import Other, read_results
from editunlearn.evaluation.results import Measured
from editunlearn.evaluation.treatments import parse

BASE = "base"


@dataclass(frozen=True)
class Column:
    """One state of a model on one suite.

    Attributes:
        label: unique among its suite's columns.
        about: what the results file says of the run, without the items.
        measured: the items.
    """

    label: str
    about: Mapping[str, Any]
    measured: Measured

    def value(self, name: str) -> float | None:
        """A number of the summary; None when it is not there or was not measured."""
        found: float | None = (self.about["summary"].get(name) or {}).get("value")
        return found

    @property
    def edited(self) -> bool:
        """Whether a delta was applied."""
        return self.about.get("delta") is not None

    @property
    def under(self) -> str:
        """What was done to the model besides, "" for nothing."""
        return self.about.get("under") or ""

    @property
    def half(self) -> bool:
        """Whether only half of the facts were asked, because the others were shown to the model."""
        return bool(self.under) and parse(self.under).halves


def gather(places: Sequence[Path]) -> dict[str, list[Column]]:
    """Results below the given folders or files, by suite; the base first, then in the order of the places.

    Raises:
        InputError: a place does not exist or holds no results, or some of another version or damaged.
    """
    problems: list[str] = []
    found: dict[str, list[Column]] = {}
    seen: set[Path] = set()
    for place in places:
        try:
            there = list(_results_below(place))
        except InputError as error:
            problems += error.problems
            continue
        if not there:
            problems.append(f"{place}: no results.json of 'editunlearn evaluate' in it or below it.")
        for file, other in ((f, o) for f, o in there if f.resolve() not in seen):
            seen.add(file.resolve())
            columns = found.setdefault(_suite(other), [])
            taken = {column.label for column in columns}
            label = _free(str(other.about["label"]), taken, file)
            columns.append(Column(label, {k: v for k, v in other.about.items() if k != "parts"}, other.measured))
    if problems:
        raise InputError(problems)
    return {suite: sorted(columns, key=lambda c: c.label != BASE) for suite, columns in found.items()}


def _results_below(place: Path) -> Iterator[tuple[Path, Other]]:
    if place.is_file():
        yield place, read_results(place)
        return
    theirs = [file for file in place.rglob(EVAL_FILE) if not file.with_name(results.FILE).is_file()]  # ours has both
    for file in sorted([*place.rglob(results.FILE), *theirs]):
        with suppress(results.ForeignError):  # apply writes a results.json of its own
            yield file, read_results(file)


def _suite(other: Other) -> str:
    """The suite of results; which of TOFU's shares open-unlearning's are about shows in how many items there are."""
    if other.about["suite"] != ANY:
        return str(other.about["suite"])
    which = {40: ":forget01", 200: ":forget05", 400: ":forget10"}
    return ANY + which.get(len(other.measured.parts["forget"]), "")


def _free(label: str, taken: set[str], file: Path) -> str:
    """A label that is not taken: with the names of the folders around it, as many as it takes."""
    for parent in file.resolve().parents[2:]:
        if label not in taken:
            return label
        label = f"{parent.name}/{label}"
    return label


def asked_alike(part: str, columns: Sequence[Column]) -> bool:
    """Whether the columns that have a part were asked the same, those that were asked half of it among themselves."""
    having = [column for column in columns if part in column.measured.data]
    return all(len({c.measured.data[part] for c in having if c.half == half}) < 2 for half in (False, True))


def changed_settings(columns: Sequence[Column]) -> list[str]:
    """What differs between columns that should not: model, dtype, limit, data."""
    notes = []
    for name in ("weights", "dtype", "limit"):
        values = {str(column.about[name]) for column in columns if name in column.about}
        if len(values) > 1:
            notes.append(f"These columns differ in {name}: {', '.join(sorted(values))}.")
    for part in sorted({part for column in columns for part in column.measured.data}):
        if not asked_alike(part, columns):
            notes.append(f"The part {part} asked different things in different columns; compare nothing of it.")
    incomplete = [column.label for column in columns if not column.about.get("complete")]
    return notes + ([f"Not finished: {', '.join(incomplete)}."] if incomplete else [])
