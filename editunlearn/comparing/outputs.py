"""What a comparison ends with: tables, the Pareto plot, the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from editunlearn.comparing import gold, views
from editunlearn.comparing.asking import TEST, beside
from editunlearn.comparing.queue import Cell
from editunlearn.evaluation.report import page, plots
from editunlearn.evaluation.results import Value

if TYPE_CHECKING:
    from editunlearn.comparing.queue import Cost, Queue
    from editunlearn.comparing.schedule import Runs

COLUMNS = {
    "forget.leak": "leak",
    "forget.refusal": "refused",
    "paraphrases.leak": "leak, paraphrases",
    "neighbors.correct": "neighbours kept",
    "retain.correct": "retain kept",
    "heldout.correct": "held out kept",
    "over_refusal": "wrongly refused",
    "perplexity": "perplexity",
    "forget_likeness_ks": "KS to the reference",
}
"""Numbers of the test half that the tables show, and their headings."""
TREATED = {"forget.leak": "leak", "forget.refusal": "refused", "retain.correct": "retain kept"}
"""The same of treated models."""
SUITES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "tofu": {
            "forget_quality": "forget quality",
            "forget_quality_ks": "KS",
            "model_utility": "model utility",
            "forget.leak": "leak",
            "forget.rouge_l": "ROUGE, forget",
            "retain.rouge_l": "ROUGE, retain",
            "real_authors.rouge_l": "ROUGE, real authors",
            "world_facts.rouge_l": "ROUGE, world facts",
        }
    }
)
"""Of other suites; of one that is not named here, all numbers that are made of several parts."""


@dataclass(frozen=True)
class Row:
    """A line of a table: one method in one view.

    Attributes:
        values: mean over seeds by name, ``leak`` and ``kept`` of :mod:`views` among them.
        front: whether no other row leaks as little and keeps as much.
    """

    name: str
    trial: int | None
    setting: str
    values: Mapping[str, Value]
    front: bool = False


def rows(found: Sequence[Runs], bare: Mapping[str, Mapping[str, Any]], *, matched: bool) -> list[Row]:
    """One view on the test half: models without an edit by name, then the methods that have a trial for it.

    A reference is no point of the front: it is what forgetting is held against, not a way to forget.
    """
    made = [Row(name, None, "", _values([summary])) for name, summary in bare.items()]
    for runs in found:
        trial = runs.matched if matched else runs.chosen
        summaries = [summary for (number, _), summary in runs.test.items() if number == trial]
        if trial is not None and summaries:
            made.append(Row(runs.arm.name, trial, _setting(runs, trial), _values(summaries)))
    places = {row.name: (row.values["leak"].value or 0.0, row.values["kept"].value or 0.0) for row in made}
    places.pop(gold.FOLDER, None)
    front = dict(zip(places, views.on_front(list(places.values())), strict=True))
    return [replace(row, front=front.get(row.name, False)) for row in made]


def _setting(runs: Runs, trial: int) -> str:
    from editunlearn.comparing.sweep import setting, strength

    key = strength(runs.arm.trials[trial])
    return f"{key}={setting(runs.arm.trials[trial], key):g}"


def _values(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    points = [views.point("", 0, 0, summary) for summary in summaries]
    found = {"leak": views.over_seeds([p.leak for p in points]), "kept": views.over_seeds([p.kept for p in points])}
    names = dict.fromkeys(name for summary in summaries for name in summary)
    for name in names:
        values = [v for s in summaries if (v := (s.get(name) or {}).get("value")) is not None]
        reason = next((s[name]["reason"] for s in summaries if name in s), "")
        found[name] = views.over_seeds(values) if values else Value(None, reason=reason or "not measured")
    return found


def table(made: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a view; columns that nothing was measured for are left out."""
    names = {n: text for n, text in COLUMNS.items() if any(_of(row, n).value is not None for row in made)}
    columns = ["method", "setting", "all leak", "all kept", *names.values(), "front"]
    cells = [
        [row.name, row.setting, *(cell(_of(row, n)) for n in ("leak", "kept", *names)), "yes" if row.front else ""]
        for row in made
    ]
    return columns, cells


def others(
    made: Sequence[Row], suites: Sequence[str], treatments: Sequence[str]
) -> dict[str, tuple[list[str], list[list[str]]]]:
    """By title, tables of what was measured beside the test half: one for treated models, one for each suite."""
    treated = {beside(t, n): f"{text}, {t}" for t in treatments for n, text in TREATED.items()}
    found = {"the same after it was treated": treated} if treated else {}
    for suite in suites:
        start = beside(suite, "")
        names = [n.removeprefix(start) for row in made for n in row.values if n.startswith(start)]
        columns = SUITES.get(suite.partition(":")[0]) or {n: n for n in dict.fromkeys(names) if "." not in n}
        found[suite] = {beside(suite, n): text for n, text in columns.items()}
    return {
        title: (["method", *columns.values()], [[row.name, *(cell(_of(row, n)) for n in columns)] for row in made])
        for title, columns in found.items()
    }


def _of(row: Row, name: str) -> Value:
    return row.values.get(name, Value(None))


def cell(value: Value) -> str:
    """A number with half the width of its interval over seeds."""
    if value.value is None:
        return "-"
    shown = f"{value.value:.4g}" if abs(value.value) >= 10 else f"{value.value:.3f}"
    return shown if value.high is None else f"{shown} ± {value.high - value.value:.2g}"


def costs(found: Sequence[Runs], anew: float | None = None) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the cost table: means over the seeds of what was chosen.

    Args:
        anew: floating-point operations of training the model anew, to compare with.
    """
    columns = ["method", "wall time", "peak memory", "FLOPs", "tokens seen", "weights changed", "delta"]
    columns += [] if anew is None else ["less than training anew"]
    cells = []
    for runs in found:
        every = [cost for (trial, _), cost in runs.costs.items() if trial == runs.chosen]
        if every:
            cells.append([runs.arm.name, *_cost(every), *([] if anew is None else [_times(every, anew)])])
    return columns, cells


def _cost(every: Sequence[Cost]) -> Iterator[str]:
    whole = [cost for cost in every if not cost.resumed]
    count = len(whole)
    memory = [cost.memory for cost in every if cost.memory is not None]
    yield f"{sum(c.seconds for c in whole) / count:.1f} s" if whole else "interrupted"
    yield f"{max(memory) / 1e9:.2f} GB" if memory else "not told"
    yield f"{sum(c.flops for c in whole) / count:.3g}" if whole else "interrupted"
    yield f"{sum(c.tokens for c in whole) / count:,.0f}" if whole else "interrupted"
    yield f"{sum(c.changed for c in every) / len(every):.3%}"
    yield f"{sum(c.delta for c in every) / len(every) / 1e6:.2f} MB"


def _times(every: Sequence[Cost], anew: float) -> str:
    flops = [cost.flops for cost in every if cost.flops and not cost.resumed]
    return f"{anew * len(flops) / sum(flops):.2g} times" if flops else "interrupted"


def failures(found: Sequence[Runs]) -> list[list[str]]:
    """Method, run and reason of each run that failed."""
    return [[runs.arm.name, run, reason] for runs in found for run, reason in runs.failed.items()]


def document(
    request: Mapping[str, Any], found: Sequence[Runs], views_of: Mapping[str, Sequence[Row]]
) -> dict[str, Any]:
    """``comparison.json``: the views, every trial on the validation half, costs and failures."""
    return {
        "format": "editunlearn-comparison",
        "version": 1,
        "request": dict(request),
        "views": {
            view: [{**asdict(row), "values": {k: asdict(v) for k, v in row.values.items()}} for row in made]
            for view, made in views_of.items()
        },
        "methods": {
            runs.arm.name: {
                "chosen": runs.chosen,
                "matched": runs.matched,
                "validation": [{**_plain(p), "setting": _setting(runs, p.trial)} for p in runs.trials],
                "costs": [{"trial": t, "seed": s, **asdict(cost)} for (t, s), cost in runs.costs.items()],
                "failed": runs.failed,
            }
            for runs in found
        },
    }


def _plain(point: views.Point) -> dict[str, Any]:
    found = asdict(point)
    return {**found, "score": point.score, "perplexity": point.perplexity if point.perplexity < 1e300 else None}


def markdown(tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]], notes: Sequence[str]) -> str:
    """All tables, and how to read them."""
    out = ["# Comparison", "", *(f"- {note}" for note in notes), ""]
    for title, (columns, cells) in tables.items():
        out += [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        out += [f"| {' | '.join(_escaped(text) for text in line)} |" for line in cells] + [""]
    return "\n".join(out)


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def pareto(found: Sequence[Runs], chosen: Sequence[Row]) -> str | None:
    """The plot, or None without matplotlib: test means with intervals over seeds; small dots are all trials."""
    if not plots.available():
        return None
    marks = [
        plots.Mark(row.name, row.values["leak"], row.values["kept"], trials)
        for row in chosen
        for trials in [next(([(p.leak, p.kept) for p in r.trials] for r in found if r.arm.name == row.name), [])]
    ]
    return plots.pareto(marks)


def html(queue: Queue, found: Sequence[Runs], title: str, svg: str | None) -> str:
    """The report page: the unedited model and the chosen trial of every method (seed 0) side by side, by suite."""
    from editunlearn.evaluation.report.gathering import gather

    folders = [queue.folder(Cell(runs.arm, runs.chosen)) for runs in found if (runs.chosen, 0) in runs.test]  # type: ignore[arg-type]
    bare = [queue.out / "base", *([queue.out / gold.FOLDER] if queue.never is not None else [])]
    places = [folder / name for name in queue.asking.places(TEST).values() for folder in (*bare, *folders)]
    sections = [
        page.section(suite, columns) for suite, columns in gather([place for place in places if place.is_dir()]).items()
    ]
    if svg:
        drawn = {"Forgotten against kept, by method": svg}
        sections[0] = replace(sections[0], plots={**drawn, **sections[0].plots})
    return page.html(title, sections)
