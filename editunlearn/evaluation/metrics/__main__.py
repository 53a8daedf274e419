"""The page of all metrics: ``python -m editunlearn.evaluation.metrics > docs/metrics.md``."""

from __future__ import annotations

import sys

from editunlearn.evaluation.metrics import Definition
from editunlearn.evaluation.metrics.glossary import MODULES


def _range(definition: Definition) -> str:
    low, high = ("-inf" if definition.low is None else f"{definition.low:g}"), definition.high
    return f"{low} to {'inf' if high is None else f'{high:g}'}"


def markdown() -> str:
    """Tables of all definitions, one for each module."""
    lines = [
        "# Metrics",
        "",
        "Made by `python -m editunlearn.evaluation.metrics`. *Better* is meant for what is to be forgotten; on what is",
        "to stay, the other way round. *reference*: best is what a model has that never saw the forget set. What",
        "cannot be measured is `null`, with the reason.",
    ]
    for module in MODULES:
        lines += ["", f"## {(module.__doc__ or '').strip().rstrip('.')}", ""]
        lines += ["| metric | better | range | formula | source | caution |", "|---|---|---|---|---|---|"]
        for d in module.DEFINITIONS:
            lines.append(f"| `{d.name}` | {d.better} | {_range(d)} | {d.formula} | {d.source} | {d.caution} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
