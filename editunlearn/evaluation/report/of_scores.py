"""The page for one run of ``apply``, of what it measured before and after the edit anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from editunlearn.evaluation.report import page
from editunlearn.evaluation.report.gathering import BASE, Column
from editunlearn.evaluation.results import Item, Measured, Value
from editunlearn.evaluation.scoring import Answered, Scores


def one_page(title: str, before: Scores, after: Scores, about: Mapping[str, Any]) -> str:
    """Base and edited model side by side, as HTML.

    Args:
        about: model, dtype, method, when it was made, environment; the same for both columns.
    """
    columns = [_column(BASE, before, {**about, "delta": None, "method": None})]
    columns.append(_column("edited", after, {**about, "delta": {"sites": "see delta.json"}}))
    return page.html(title, [page.section("facts", columns)])


def _column(label: str, scores: Scores, about: Mapping[str, Any]) -> Column:
    groups: Mapping[str, Sequence[Sequence[Answered]]] = {
        "forget": [[answered] for answered in scores.forget],
        "distracted": [[answered] for answered in scores.distracted],
        "paraphrases": scores.paraphrases,
        "questions": scores.questions,
        "neighbors": scores.neighbors,
        "retain": [[answered] for answered in scores.retain],
        "heldout": [[answered] for answered in scores.heldout],
    }
    forgotten = ("forget", "distracted", "paraphrases", "questions")
    parts = {
        name: [
            _item(answered, str(number), "leak" if name in forgotten else "correct")
            for number, group in enumerate(of_fact)
            for answered in group
        ]
        for name, of_fact in groups.items()
    }
    measured = Measured({name: items for name, items in parts.items() if items}, dict.fromkeys(parts, "of this run"))
    totals = {"leak_gen": Value.mean(measured.values("forget", "leak")), "perplexity": Value(scores.perplexity)}
    summary = {name: asdict(value) for name, value in {**totals, **measured.summary()}.items()}
    return Column(label, {**about, "label": label, "complete": True, "summary": summary}, measured)


def _item(answered: Answered, group: str, metric: str) -> Item:
    hit = answered.leaked if metric == "leak" else answered.correct
    refused = answered.refused and not (metric == "leak" and answered.leaked)
    values = {metric: float(hit), "refusal": float(refused), "answer_probability": answered.probability}
    return Item(answered.prompt, answered.expected, answered.text, group, values)
