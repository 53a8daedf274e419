"""Results of open-unlearning's TOFU evaluation (github.com/locuslab/open-unlearning): read as ours, ours as theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

from editunlearn.evaluation.results import Item, Measured, Value

EVAL_FILE = "TOFU_EVAL.json"
"""Name of its results."""
ANY = "tofu"
"""Suite of such results: which share was forgotten they do not say."""
THEIR_SETS: Mapping[str, str] = MappingProxyType(
    {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
)
"""How it calls the sets."""
THEIR_ITEMS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        **{f"{short}_Q_A_Prob": (part, "probability", "prob") for part, short in THEIR_SETS.items()},
        **{f"{short}_Q_A_ROUGE": (part, "rouge_l", "rougeL_recall") for part, short in THEIR_SETS.items()},
        "forget_truth_ratio": ("forget", "truth_ratio", "score"),
        "retain_Truth_Ratio": ("retain", "truth_ratio", "score"),
        "ra_Truth_Ratio": ("real_authors", "truth_ratio", "score"),
        "wf_Truth_Ratio": ("world_facts", "truth_ratio", "score"),
        "ra_Q_A_Prob_normalised": ("real_authors", "probability_among", "prob"),
        "wf_Q_A_Prob_normalised": ("world_facts", "probability_among", "prob"),
        "extraction_strength": ("forget", "extraction_strength", "score"),
        "exact_memorization": ("forget", "exact_memorization", "score"),
    }
)
"""Its names of what has a value for each item: our part and metric, and how they call the value."""
THEIR_TOTALS: Mapping[str, str] = MappingProxyType(
    {
        "forget_truth_ratio": "forget_truth_ratio",
        "retain_Truth_Ratio": "retain_truth_ratio",
        "ra_Truth_Ratio": "real_authors_truth_ratio",
        "wf_Truth_Ratio": "world_facts_truth_ratio",
        "model_utility": "model_utility",
        "forget_quality": "forget_quality",
        "privleak": "priv_leak",
    }
)
"""Its names of our totals."""


def from_open_unlearning(file: Any, label: str) -> tuple[dict[str, Any], Measured]:
    """What a TOFU_EVAL.json holds, like :func:`editunlearn.evaluation.results.load`.

    Args:
        file: the JSON.
        label: to show it under; the file has no name for its model.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is not such a file.
    """
    by_part: dict[str, dict[int, dict[str, float]]] = {}
    for theirs, (part, metric, key) in THEIR_ITEMS.items():
        for index, item in (file.get(theirs, {}).get("value_by_index") or {}).items():
            if item and item.get(key) is not None:
                by_part.setdefault(part, {}).setdefault(int(index), {})[metric] = float(item[key])
    found = Measured(
        {
            part: [Item("", "", None, "", values) for _, values in sorted(items.items())]
            for part, items in by_part.items()
        }
    )
    if not found.values("forget", "truth_ratio"):
        raise KeyError("forget_truth_ratio")
    numbers = {ours: file[theirs]["agg_value"] for theirs, ours in THEIR_TOTALS.items() if theirs in file}
    own = {name: replace(value, reason="") for name, value in found.summary().items()}  # the notes are on our own ways
    summary = own | {
        name: Value(None if number is None else float(number), reason="" if number is not None else "not in the file")
        for name, number in numbers.items()
    }
    about = {"suite": ANY, "label": label, "complete": True, "method": "open-unlearning"}
    return {**about, "summary": {name: asdict(value) for name, value in summary.items()}}, found


def to_open_unlearning(measured: Measured, found: Mapping[str, Value]) -> dict[str, Any]:
    """The same numbers under the names of open-unlearning's TOFU_EVAL.json."""
    out: dict[str, Any] = {}
    for theirs, (part, metric, key) in THEIR_ITEMS.items():
        values = measured.values(part, metric)
        ours = THEIR_TOTALS.get(theirs)
        out[theirs] = {
            "agg_value": found[ours].value if ours else measured.mean(part, metric),
            "value_by_index": {str(i): {key: value} for i, value in enumerate(values)},
        }
    return out | {
        theirs: {"agg_value": found[ours].value} for theirs, ours in THEIR_TOTALS.items() if theirs not in out
    }
