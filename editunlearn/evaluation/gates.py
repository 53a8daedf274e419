"""Requirements on results: ``leak_gen<=0.02``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from editunlearn.errors import InputError
from editunlearn.evaluation.metrics.glossary import check_name
from editunlearn.naming import did_you_mean

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
)
_GATE = re.compile(r"\s*([\w.+-]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Gate:
    """A metric must be on one side of a bound in every edited state; without any, in every state.

    Attributes:
        metric: as in a summary, ``part.metric`` or a total.
        sign: ``<=``, ``>=``, ``<`` or ``>``.
        bound: to be met.
    """

    metric: str
    sign: str
    bound: float

    def failures(self, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
        """One line for every state that does not meet it; what was not measured does not.

        Args:
            found: suite -> label -> results with a summary.

        Raises:
            InputError: no suite has such a metric.
        """
        names = {name for by_label in found.values() for results in by_label.values() for name in results["summary"]}
        if self.metric not in names:
            raise InputError(f"--require {self}: there is no such metric.{did_you_mean(self.metric, names)}")
        lines = []
        for suite, by_label in found.items():
            if not any(self.metric in results["summary"] for results in by_label.values()):
                continue  # it is of another suite
            edited = any(results["delta"] is not None for results in by_label.values())
            for label, results in by_label.items():
                if edited and results["delta"] is None:
                    continue
                value = results["summary"].get(self.metric) or {"value": None, "reason": "it applied to nothing"}
                if value["value"] is None:
                    lines.append(f"{suite}, {label}: {self} is not met: not measured ({value['reason']})")
                elif not _OPERATORS[self.sign](value["value"], self.bound):
                    lines.append(f"{suite}, {label}: {self} is not met: {value['value']:.4g}")
        return lines

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.bound:g}"


def parse(text: str, *, ours: bool) -> Gate:
    """A gate from ``METRIC<=NUMBER``.

    Args:
        ours: only suites of ours are run, so that the metric is one of theirs.

    Raises:
        InputError: it is not of that form, or there is no such metric.
    """
    match = _GATE.fullmatch(text)
    try:
        gate = Gate(match[1], match[2], float(match[3]))  # type: ignore[index]
    except (TypeError, ValueError):
        raise InputError(f'--require {text!r}: write METRIC, <=, >=, < or >, and a number: "leak_gen<=0.02".') from None
    if ours:
        try:
            check_name(gate.metric)
        except InputError as error:
            raise InputError(f"--require {gate}: {error}") from None
    return gate
