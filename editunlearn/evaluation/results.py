"""What was measured, by part and item; the numbers made of it; and the file that keeps both."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from editunlearn.errors import InputError
from editunlearn.evaluation.metrics.glossary import definition_of
from editunlearn.evaluation.metrics.intervals import Estimate, estimate, mean_of_means
from editunlearn.evaluation.metrics.likelihood import TRUTH_RATIO_NOTE

NOTES: Mapping[str, str] = MappingProxyType({"truth_ratio": TRUTH_RATIO_NOTE})
"""By metric, what must be known to read its mean."""
FORMAT, VERSION = "editunlearn-results", 1
FILE = "results.json"
NEEDED = ("suite", "label", "complete", "summary", "data", "parts")
"""What every results file says, beside its format and version."""


@dataclass(frozen=True)
class Value:
    """One number.

    Attributes:
        value: None when it could not be measured; then there is a reason.
        low, high: bounds of its 95% interval, where there is one.
        items: how many it was made of.
        reason: why there is no value, or what must be known to read it.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    items: int | None = None
    reason: str = ""

    @classmethod
    def mean(cls, values: Sequence[float], reason: str = "no item to which it applies", *, share: bool = True) -> Value:
        """Mean of items with its interval; ``share``: zeros and ones are hits and misses."""
        return cls._of(estimate(values, share=share), reason)

    @classmethod
    def mean_of_means(cls, groups: Sequence[Sequence[float]], reason: str = "no item to which it applies") -> Value:
        """Mean of the means of groups with its interval."""
        return cls._of(mean_of_means(groups), reason)

    @classmethod
    def _of(cls, found: Estimate | None, reason: str) -> Value:
        if found is None:
            return cls(None, reason=reason)
        low, high = (bound if math.isfinite(bound) else None for bound in (found.low, found.high))
        return cls(found.value, low, high, found.items)

    def mapped(self, to: Callable[[float], float], reason: str = "") -> Value:
        """The same in other units: ``to`` of the value and of its bounds, rising or falling all the way."""
        if self.value is None:
            return self
        bounds = [to(bound) for bound in (self.low, self.high) if bound is not None]
        low, high = (min(bounds), max(bounds)) if len(bounds) == 2 else (None, None)
        return Value(to(self.value), low, high, self.items, reason)

    @classmethod
    def perplexity(cls, nll: Sequence[float], tokens: Sequence[float]) -> Value:
        """exp of the mean loss a token, from the sums of passages."""
        count = sum(tokens)
        if not count:
            return cls(None, reason="no text")
        value = math.exp(min(sum(nll) / count, 700.0))
        return cls(value, items=int(count), reason="" if value < 1e300 else "larger than this")


@dataclass(frozen=True)
class Item:
    """One probe and what came of it.

    Attributes:
        shown: what was asked; "" when it may not be kept.
        expected: the true answer.
        said: the decoded text, None when none was asked for.
        group: see :class:`editunlearn.evaluation.probes.Probe`.
        values: metric -> value.
    """

    shown: str
    expected: str
    said: str | None
    group: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """Items by part.

    Attributes:
        parts: name -> items.
        data: hash of what was asked, to refuse a reference that was asked something else.
    """

    parts: Mapping[str, Sequence[Item]]
    data: Mapping[str, str] = field(default_factory=dict)

    def values(self, part: str, metric: str, group: str | None = None) -> list[float]:
        """Of the items to which the metric applies, in order."""
        items = self.parts.get(part, ())
        return [i.values[metric] for i in items if metric in i.values and group in (None, i.group)]

    def mean(self, part: str, metric: str) -> float | None:
        """Plain mean; None when there is nothing."""
        found = self.values(part, metric)
        return sum(found) / len(found) if found else None

    def summary(self) -> dict[str, Value]:
        """``part.metric`` -> mean with its interval."""
        names = {part: list(dict.fromkeys(m for i in items for m in i.values)) for part, items in self.parts.items()}
        return {
            f"{part}.{m}": replace(Value.mean(self.values(part, m), share=_is_share(m)), reason=NOTES.get(m, ""))
            for part, metrics in names.items()
            for m in metrics
        }


def _is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1, so that zeros and ones are hits and misses."""
    definition = definition_of(metric)
    return definition is None or (definition.low, definition.high) == (0, 1)


def asked_hash(items: Sequence[Sequence[Any]]) -> str:
    """Hash of what is asked, and of how, 16 hex digits."""
    return hashlib.sha256(json.dumps(list(items), ensure_ascii=False).encode()).hexdigest()[:16]


def check_alike(measured: Mapping[str, str], other: Measured, place: str) -> None:
    """Raise InputError unless other results were asked the same, where they say what they were asked.

    Args:
        measured: part -> hash of what is asked now.
    """
    differ = [part for part, data in measured.items() if other.data.get(part, data) != data]
    if differ:
        raise InputError(
            f"{place}: made on other data than this run ({', '.join(differ)}). Give results of the same suite, "
            "with the same --limit."
        )


class ForeignError(InputError):
    """A file that is no results file of this package, and does not say that it is one."""


def load(path: Path) -> tuple[dict[str, Any], Measured]:
    """A results file: what it says about the run, and what was measured.

    Raises:
        ForeignError: there is none, or it is another kind of file.
        InputError: it is of another version, or damaged.
    """
    file = path / FILE if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForeignError(f"{file}: no such file. Give a results.json, or the folder of an evaluation.") from None
    except ValueError as error:
        raise ForeignError(f"{file}: not JSON: {error}.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ForeignError(f"{file}: not a results file of this package (its format is not {FORMAT!r}).")
    if found.get("version") != VERSION:
        raise InputError(f"{file}: format version {found.get('version')}; this package reads {VERSION}.")
    again = "Remove it and run its command again."
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise InputError(f"{file}: damaged, it has no {', '.join(missing)}. {again}")
    try:
        parts = {name: [Item(**item) for item in items] for name, items in found["parts"].items()}
        for value in found["summary"].values():
            Value(**value)
        return found, Measured(parts, {**found["data"]})
    except (TypeError, AttributeError) as error:
        raise InputError(f"{file}: damaged, {error}. {again}") from error


def as_json(about: Mapping[str, Any], measured: Measured, totals: Mapping[str, Value]) -> dict[str, Any]:
    """What :func:`load` reads."""
    summary = {**measured.summary(), **totals}
    return {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "summary": {name: asdict(value) for name, value in summary.items()},
        "data": dict(measured.data),
        "parts": {name: [asdict(item) for item in items] for name, items in measured.parts.items()},
    }
