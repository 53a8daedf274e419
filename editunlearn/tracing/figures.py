"""Average indirect effects as a picture: heat maps by role and block, and curves at the subject's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editunlearn.artifacts import atomic_path
from editunlearn.errors import InputError
from editunlearn.tracing.prompts import LAST, ROLES

FILES = ("locate.svg", "locate.png")
_TITLES = {"block": "block output", "mlp": "MLP output", "attention": "attention output"}
_COLOURS = {"block": "#444444", "mlp": "#228833", "attention": "#aa3377"}


def check() -> None:
    """Raise InputError unless matplotlib is installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InputError(
            "the figure needs matplotlib: pip install 'editunlearn[report]', or give --no-figure for the JSON alone."
        )


def write(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    """Draw a result of ``locate`` and save it as SVG and PNG; two equal results give equal files.

    Args:
        found: what ``averages.summary`` gives.
    """
    import matplotlib

    figure = draw(found)
    paths = [folder / name for name in FILES]
    with matplotlib.rc_context({"svg.hashsalt": "editunlearn", "svg.fonttype": "none"}):
        for path in paths:
            kind = path.suffix[1:]
            plain: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=kind, metadata=plain, dpi=150)
    return paths


def draw(found: Mapping[str, Any]) -> Any:
    """A matplotlib figure: measured maps above estimated ones, a column for each kind, and the curves below."""
    from matplotlib.figure import Figure

    kinds: Mapping[str, Any] = found["kinds"]
    rows = [name for name in ("measured", "estimated") if all(name in about for about in kinds.values())]
    curves = "measured" in rows
    figure = Figure(figsize=(4.4 * len(kinds) + 1, 2.2 * len(rows) + (2.8 if curves else 0)), layout="constrained")
    grid = figure.add_gridspec(len(rows) + curves, len(kinds), height_ratios=[1.0] * len(rows) + [1.3] * curves)
    for row, name in enumerate(rows):
        for column, (kind, about) in enumerate(kinds.items()):
            axes = figure.add_subplot(grid[row, column])
            _map(figure, axes, about[name], labelled=column == 0)
            many = f", {about['window']} blocks together" if about["window"] > 1 else ""
            how = "by gradient" if name == "estimated" else "restored"
            axes.set_title(f"{_TITLES[kind]}, {how}{many}", fontsize=9)
    if curves:
        _curves(figure.add_subplot(grid[-1, :]), found)
    return figure


def _map(figure: Any, axes: Any, table: Mapping[str, Sequence[Any]], *, labelled: bool) -> None:
    roles = [role for role in ROLES if role in table]
    values = [[cell[0] for cell in table[role]] for role in roles]
    largest = max((abs(value) for row in values for value in row), default=0.0) or 1.0
    image = axes.imshow(values, aspect="auto", cmap="PRGn", vmin=-largest, vmax=largest, interpolation="nearest")
    axes.set_yticks(range(len(roles)), roles if labelled else [""] * len(roles), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("block", fontsize=8)
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)


def _curves(axes: Any, found: Mapping[str, Any]) -> None:
    for kind, about in found["kinds"].items():
        _curve(axes, about["measured"][LAST], _COLOURS[kind], "-", _TITLES[kind])
    for path, cells in found["severed_at_last_subject_token"].items():
        _curve(axes, cells, _COLOURS[path], "--", f"block output, {_TITLES[path].split()[0]} above cut off")
    axes.axhline(0, color="#888888", linewidth=0.6)
    axes.set_title("effect at the last subject token, with 95% intervals over facts", fontsize=9)
    axes.set_xlabel("block", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False)


def _curve(axes: Any, cells: Sequence[Any], colour: str, style: str, label: str) -> None:
    blocks = range(len(cells))
    axes.plot(blocks, [cell[0] for cell in cells], style, color=colour, label=label, linewidth=1.4)
    if all(cell[1] is not None for cell in cells):
        low, high = [cell[1] for cell in cells], [cell[2] for cell in cells]
        axes.fill_between(blocks, low, high, color=colour, alpha=0.15, linewidth=0)
