"""The page: one HTML file that needs nothing else, and the summary as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from editunlearn.evaluation.metrics import Definition
from editunlearn.evaluation.metrics.glossary import better, definition_of
from editunlearn.evaluation.report import plots
from editunlearn.evaluation.report.gathering import Column, asked_alike, changed_settings
from editunlearn.evaluation.report.verdict import Verdict, verdicts
from editunlearn.evaluation.results import Item

SHOWN_ITEMS = 400
"""Items of one part on the page; the results files have all of them."""
NOTHING = ("", "not asked")
"""What a column says where it was not asked."""


@dataclass(frozen=True)
class Cell:
    """A number on the page.

    Attributes:
        text: as shown, "-" for none.
        interval: "" for none.
        note: why there is none, or how to read it.
        order: what a column is sorted by.
    """

    text: str
    interval: str = ""
    note: str = ""
    order: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of the summary: a metric with a cell for each column."""

    name: str
    better: str
    definition: Definition | None
    cells: tuple[Cell, ...]

    @property
    def note(self) -> str:
        """That all its numbers have in common, "" for none."""
        notes = {cell.note for cell in self.cells}
        return notes.pop() if len(notes) == 1 else ""


@dataclass(frozen=True)
class Asked:
    """One item with what each column said and its outcome."""

    shown: str
    expected: str
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """All about one suite; ``totals`` are made of several parts, ``lines`` are means over one."""

    suite: str
    columns: Sequence[Column]
    verdicts: Sequence[Verdict]
    lines: Sequence[Line]
    totals: Sequence[Line]
    items: Mapping[str, Sequence[Asked]]
    plots: Mapping[str, str]
    notes: Sequence[str]


def section(suite: str, columns: Sequence[Column]) -> Section:
    """What the page says of one suite."""
    drawn: dict[str, str | None] = {}
    found = lines(columns)
    about = changed_settings(columns)
    if plots.available():
        drawn = {
            "What is left against what is kept": plots.trade_off(columns),
            "What each way to ask brings out": plots.attacks(columns),
        }
    else:
        about.append('No plots: pip install "editunlearn[report]" for matplotlib.')
    return Section(
        suite,
        columns,
        verdicts(columns),
        [line for line in found if "." in line.name],
        [line for line in found if "." not in line.name],
        {part: asked for part in parts_with_text(columns) if (asked := items(part, columns))},
        {title: svg for title, svg in drawn.items() if svg},
        about,
    )


def lines(columns: Sequence[Column]) -> list[Line]:
    """Every number that any column has."""
    names = list(dict.fromkeys(name for column in columns for name in column.about["summary"]))
    return [Line(name, better(name), definition_of(name), tuple(_cells(name, columns))) for name in names]


def _cells(name: str, columns: Sequence[Column]) -> Iterator[Cell]:
    for column in columns:
        yield _cell(column.about["summary"].get(name))


def _cell(value: Mapping[str, Any] | None) -> Cell:
    if value is None:
        return Cell("-")
    if value["value"] is None:
        return Cell("-", note=value["reason"])
    interval = "" if value["low"] is None else f"{value['low']:.3g} to {value['high']:.3g}"
    return Cell(f"{value['value']:.4g}", interval, value["reason"], value["value"])


def notes(shown: Sequence[Line]) -> dict[str, list[str]]:
    """By note, the numbers that it is about."""
    found: dict[str, list[str]] = {}
    for line in shown:
        for note in dict.fromkeys(cell.note for cell in line.cells if cell.note):
            found.setdefault(note, []).append(line.name)
    return found


def parts_with_text(columns: Sequence[Column]) -> list[str]:
    """Parts whose answers were decoded."""
    names = dict.fromkeys(name for column in columns for name in column.measured.parts)
    return [
        name
        for name in names
        if any(item.said is not None for column in columns for item in column.measured.parts.get(name, ()))
    ]


def items(part: str, columns: Sequence[Column]) -> list[Asked]:
    """The items of a part, where all columns that have it were asked the same."""
    if not asked_alike(part, columns):
        return []
    rows: dict[tuple[str, str, int], list[tuple[str, str]]] = {}
    having = [column for column in columns if part in column.measured.parts]
    for number, column in enumerate(having):
        times: Counter[tuple[str, str]] = Counter()
        for item in column.measured.parts[part]:
            asked = (item.shown, item.expected)
            row = rows.setdefault((*asked, times[asked]), [NOTHING] * len(having))
            row[number] = (item.said or "", outcome(item))
            times[asked] += 1  # the same may be asked again, when answers are sampled
    return [Asked(shown, expected, tuple(row)) for (shown, expected, _), row in list(rows.items())[:SHOWN_ITEMS]]


def outcome(item: Item) -> str:
    """In a word what an answer is."""
    for name, word in (("leak", "says it"), ("refusal", "refused"), ("correct", "right"), ("substitute", "other")):
        if item.values.get(name):
            return word
    return "wrong" if "correct" in item.values else ""


def html(title: str, sections: Sequence[Section]) -> str:
    """The page, self-contained."""
    from jinja2 import Environment, StrictUndefined

    text = files("editunlearn.evaluation.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    used = {
        line.definition.name: line.definition for s in sections for line in (*s.totals, *s.lines) if line.definition
    }
    return environment.from_string(text).render(
        title=title, sections=sections, glossary=sorted(used.items()), notes=notes
    )


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Verdicts and summaries."""
    out = [f"# {title}", ""]
    for part in sections:
        out += [f"## {part.suite}", ""]
        for verdict in part.verdicts:
            out += [f"**{verdict.label}: {verdict.headline}**", "", *(f"- {line}" for line in verdict.lines), ""]
        labels = [column.label for column in part.columns]
        out += [f"| metric | better | {' | '.join(labels)} |", f"|---|---|{'---|' * len(labels)}"]
        for line in (*part.totals, *part.lines):
            cells = [f"{c.text} ({c.interval})" if c.interval else c.text for c in line.cells]
            out.append(f"| {line.name} | {line.better} | {' | '.join(cells)} |")
        noted = [f"{', '.join(names)}: {note}" for note, names in notes((*part.totals, *part.lines)).items()]
        out += ["", *(f"- {note}" for note in [*part.notes, *noted]), ""]
    return "\n".join(out) + "\n"


def csv_text(sections: Sequence[Section]) -> str:
    """One line for each number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["suite", "run", "metric", "value", "low", "high", "items", "note"])
    for part in sections:
        for column in part.columns:
            for name, v in column.about["summary"].items():
                writer.writerow(
                    [part.suite, column.label, name, v["value"], v["low"], v["high"], v["items"], v["reason"]]
                )
    return out.getvalue()
