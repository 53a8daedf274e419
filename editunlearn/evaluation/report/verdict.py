"""What the numbers of the suite ``facts`` say, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editunlearn.evaluation.report.gathering import Column
from editunlearn.evaluation.treatments import parse

GONE, BACK = 0.05, 0.10
"""At most this share leaks: suppressed. At least this share comes back under an attack: it returns."""
KNOWN = 0.5
"""Share of the facts that the base must tell, or there was little to forget."""
KEPT, RISE = 0.90, 0.03
"""At least this share of what the base answers is kept, and perplexity rises by at most this: little is lost."""


@dataclass(frozen=True)
class Verdict:
    """About one edited state.

    Attributes:
        label: of the column.
        good: facts are gone from the answers, nothing brings many back, little is lost.
        headline: in a few words.
        lines: the numbers behind it.
    """

    label: str
    good: bool
    headline: str
    lines: tuple[str, ...]


def verdicts(columns: Sequence[Column]) -> list[Verdict]:
    """One for every edit; what was done to it besides counts as attacks on it."""
    edits = [c for c in columns if c.edited and not c.under and _leak(c) is not None]
    return [_verdict(c, _base_of(c, columns), columns) for c in edits]


def _base_of(column: Column, columns: Sequence[Column]) -> Column | None:
    """The same model without an edit, asked the same."""

    def what(other: Column) -> list[object]:
        return [other.about.get(name) for name in ("weights", "dtype", "limit")]

    return next((c for c in columns if not c.edited and not c.under and what(c) == what(column)), None)


def _leak(column: Column) -> float | None:
    return column.value("leak_gen")


def _verdict(column: Column, base: Column | None, columns: Sequence[Column]) -> Verdict:
    leak = _leak(column)
    assert leak is not None  # noqa: S101 - the caller looked
    attacks = _attacks(column, columns)
    back = {name: share for name, share in attacks.items() if share >= max(BACK, leak + BACK)}
    losses, kept, lost = _losses(column, base)
    gone = leak <= GONE
    head = "Suppressed" if gone else "Not gone"
    if gone and back:
        head += f"; comes back: {', '.join(back)}"
    elif gone and attacks:
        head += f"; held against {len(attacks)} ways to bring it back"
    elif gone:
        head += "; no attack was run"
    if lost:
        head += "; other knowledge was damaged"
    if not kept:
        head += "; what was lost was not measured"
    known = base.value("leak_gen") if base is not None else None
    if known is not None and known < KNOWN:
        head += "; most of it was not known before"
    interval = column.about["summary"]["leak_gen"]
    lines = [
        f"Asked as written, {leak:.0%} of {interval['items']} facts leak (95% interval {interval['low']:.0%} to "
        f"{interval['high']:.0%}), {_percent(column.value('forget.refusal'))} are refused."
    ]
    lines += [f"{name}: {share:.0%} of the facts come out." for name, share in attacks.items()]
    good = gone and not back and not lost and kept and known is not None and known >= KNOWN
    return Verdict(column.label, good, head + ".", (*lines, *losses))


def _attacks(column: Column, columns: Sequence[Column]) -> dict[str, float]:
    """Share of the facts that each attack brings out."""
    run = [name for name in column.about["summary"] if name.startswith("attack_") and name.endswith("_recovered")]
    wordings = {name.removeprefix("attack_").removesuffix("_recovered").replace("_", " "): name for name in run}
    if not run:
        wordings = {part: f"{part}.leak" for part in ("distracted", "paraphrases", "questions")}
    values = {shown: column.value(name) for shown, name in wordings.items()}
    found = {shown: value for shown, value in values.items() if value is not None}
    for other in columns:
        if other.under and other.label == parse(other.under).label(column.label):
            value = _leak(other)
            if value is not None:
                found[_said(other.under)] = value
    return found


def _said(under: str) -> str:
    """``int4`` -> "rounded to int4", ``relearn:5`` -> "after relearn:5"."""
    return f"after {under}" if parse(under).count else f"rounded to {under}"


def _losses(column: Column, base: Column | None) -> tuple[list[str], bool, bool]:
    """Lines, whether anything was measured that should stay, whether too much was lost."""
    if base is None:
        return ["What was lost cannot be said: the model without the edit was not measured (--base)."], False, False
    lines, measured, lost = [], False, False
    for part in ("heldout", "neighbors", "retain"):
        before, after = base.value(f"{part}.correct"), column.value(f"{part}.correct")
        if before and after is not None:
            kept = after / before
            measured = True
            lost |= kept < KEPT
            lines.append(f"{part}: {kept:.1%} of what the base answers is still answered.")
    before, after = base.value("perplexity"), column.value("perplexity")
    if before and after is not None:
        rise = after / before - 1
        lost |= rise > RISE
        lines.append(f"Perplexity of plain text: {rise:+.1%}.")
    return lines, measured, lost


def _percent(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.0%}"
