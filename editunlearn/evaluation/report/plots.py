"""Plots as SVG text that takes the colours of the page around it, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editunlearn.evaluation.report.gathering import Column
from editunlearn.evaluation.results import Value

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa8833", "#66aacc", "#aa3377", "#888888")
"""Paul Tol's bright scheme, told apart by people who see few colours, on light and dark ground."""
INK = "#123456"
"""Stands for the page's own text colour."""


@dataclass(frozen=True)
class Mark:
    """One method in :func:`pareto`.

    Attributes:
        leak, kept: where it is, with intervals. trials: (leak, kept) of everything that was tried.
    """

    label: str
    leak: Value
    kept: Value
    trials: Sequence[tuple[float, float]] = ()


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def trade_off(columns: Sequence[Column]) -> str | None:
    """What is left of the forgotten facts against what is kept; best is the upper left corner."""
    values = [(c, c.value("leak_gen"), c.value("heldout.correct")) for c in columns]
    shown = [(c, x, y) for c, x, y in values if x is not None and y is not None]
    if len(shown) < 2:
        return None
    figure, axes = _figure(6.0, 3.6)
    points = []
    for number, (column, leak, kept) in enumerate(shown):
        drawn = axes.errorbar(
            leak,
            kept,
            xerr=_bars(column, "leak_gen", leak),
            yerr=_bars(column, "heldout.correct", kept),
            fmt="osD^vP*"[number % 7],
            color=COLOURS[number % len(COLOURS)],
            capsize=2,
            elinewidth=0.8,
        )
        points.append(drawn.lines[0])  # in the legend without its bars, which hide its shape
    axes.set_xlabel("facts to forget that leak")
    axes.set_ylabel("held-out facts answered")
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(None, 1.03)
    _legend(figure, handles=points, labels=[_plain(column.label) for column, *_ in shown])
    return _svg(figure)


def pareto(marks: Sequence[Mark]) -> str:
    """What each method leaves against what it keeps, all that it tried as small dots, and the front of the best.

    Best is the upper left corner. The front goes through those that no other beats in both.
    """
    figure, axes = _figure(6.0, 4.0)
    points, places = [], []
    for number, mark in enumerate(marks):
        colour, x, y = COLOURS[number % len(COLOURS)], mark.leak.value or 0.0, mark.kept.value or 0.0
        places.append((x, y))
        if mark.trials:
            axes.scatter(*zip(*mark.trials, strict=True), s=8, color=colour, alpha=0.5, linewidths=0)
        bars = [_reach(value) for value in (mark.leak, mark.kept)]
        form = "osD^vP*"[(number + number // len(COLOURS)) % 7]  # not again the same in the same colour
        drawn = axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt=form, color=colour, capsize=2, elinewidth=0.8)
        points.append(drawn.lines[0])
    front = sorted((x, y) for x, y in places if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in places))
    axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=0.8, linestyle="--", alpha=0.6)
    axes.set_xlabel("facts to forget that leak, over all wordings")
    axes.set_ylabel("facts that must stay, answered")
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.04, 1.04)
    _legend(figure, handles=points, labels=[_plain(mark.label) for mark in marks])
    return _svg(figure)


def _reach(value: Value) -> list[list[float]] | None:
    """How far an interval goes below and above, inside [0, 1]."""
    if value.value is None or value.low is None or value.high is None:
        return None
    return [[value.value - max(0.0, value.low)], [min(1.0, value.high) - value.value]]


def attacks(columns: Sequence[Column]) -> str | None:
    """What each way to ask brings out, a group of bars for each."""
    names = [n for c in columns for n in c.about["summary"] if n.startswith("attack_") and n.endswith("_recovered")]
    names = ["leak_gen", *dict.fromkeys(names)]
    shown = [c for c in columns if c.value("leak_gen") is not None]
    if len(names) < 2:
        return None
    figure, axes = _figure(6.0, 3.6)
    width = 0.8 / len(shown)
    for number, column in enumerate(shown):
        found = [column.value(name) for name in names]
        values = [math.nan if value is None else value for value in found]
        places = [i + (number - (len(shown) - 1) / 2) * width for i in range(len(names))]
        axes.bar(places, values, width * 0.9, color=COLOURS[number % len(COLOURS)], label=_plain(column.label))
    labels = [n.removeprefix("attack_").removesuffix("_recovered").replace("_", " ") for n in names]
    axes.set_xticks(range(len(names)), ["as written", *labels[1:]], rotation=25, ha="right", fontsize=8)
    axes.set_ylabel("facts that come out")
    axes.set_ylim(0, 1.03)
    _legend(figure)
    return _svg(figure)


def _bars(column: Column, name: str, value: float) -> list[list[float]] | None:
    found: Mapping[str, Any] = column.about["summary"][name]
    if found["low"] is None or found["high"] is None:
        return None
    return [[max(0.0, value - found["low"])], [max(0.0, found["high"] - value)]]


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib takes what is between two of them for a formula


def _legend(figure: Any, **more: Any) -> None:
    figure.legend(loc="outside upper left", frameon=False, fontsize=8, labelcolor=INK, ncols=4, **more)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    """The drawing alone, without what would make two equal runs differ (date, random ids)."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "editunlearn", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    body = text.getvalue()
    body = body[body.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
