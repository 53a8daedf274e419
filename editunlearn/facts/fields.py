"""Which column of which data set means what: one table, and the reshaping of nested records to flat ones.

Known shapes: this project's own, ROME's known_1000, CounterFact (nested and flat), zsRE (ROME's and
EasyEdit's), TOFU, RWKU and MUSE. Keys are compared without case, with spaces and hyphens as underscores.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

# The first name is this project's own and wins over the others when a row has several.
ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "case_id", "known_id", "fact_id"),
    "prompt": ("prompt", "cloze"),
    "answer": ("answer", "attribute", "target_true", "ground_truth", "object", "answers"),
    "subject": ("subject", "entity"),
    "question": ("question", "src"),
    "target": ("target", "target_new", "target_false", "alt"),
    "paraphrases": (
        "paraphrases",
        "paraphrase_prompts",
        "paraphrase",
        "paraphrased_question",
        "rephrase",
        "rephrase_prompt",
    ),
    "neighbors": ("neighbors", "neighbours"),
    "aliases": ("aliases", "answer_aliases"),
    "relation": ("relation", "relation_id"),
    # Read only in data sets that have them, never written by users of this project.
    "template": ("template",),
    "query": ("query",),
    "neighbor": ("neighbor",),
}
_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
_OWN = tuple(name for name in ALIASES if name not in ("template", "query", "neighbor"))


@dataclass(slots=True)
class Columns:
    """What the columns of a source were taken for, gathered over its rows."""

    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, None] = field(default_factory=dict)  # an ordered set

    def notes(self, name: str) -> list[str]:
        """At most two lines: what was read under another name, and what was not read at all."""
        lines = []
        if self.renamed:
            lines.append(f"{name}: " + ", ".join(f"{a!r} read as {b}" for a, b in self.renamed.items()) + ".")
        if self.ignored:
            lines.append(f"{name}: ignored columns: {', '.join(near_name(c) for c in self.ignored)}.")
        return lines


def near_name(column: str) -> str:
    """The column in quotes, with the known name that it may have been meant for."""
    plain = _plain(column)
    near = [] if plain in _CANONICAL else difflib.get_close_matches(plain, _CANONICAL, n=1, cutoff=0.75)
    return f"{column!r} (did you mean {near[0]!r}?)" if near else repr(column)


def _plain(column: str) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def flatten(data: Mapping[str, object], columns: Columns) -> dict[str, object]:
    """Values of a row by this project's field names; absent, null and unknown columns left out.

    A row may give a field under several names: the first in ``ALIASES`` is read.
    """
    data = _nested(data, columns)
    chosen: dict[str, tuple[int, str]] = {}
    for column in data:
        plain = _plain(str(column))
        name = _CANONICAL.get(plain)
        if name is None:
            columns.ignored.setdefault(str(column))
        elif data[column] is not None:
            rank = ALIASES[name].index(plain)
            if name not in chosen or rank < chosen[name][0]:
                chosen[name] = (rank, column)
    for name, (rank, column) in chosen.items():
        if rank:
            columns.renamed.setdefault(str(column), name)
    return {name: data[column] for name, (_, column) in chosen.items()}


def _nested(data: Mapping[str, object], columns: Columns) -> dict[str, object]:
    """CounterFact's requested_rewrite, EasyEdit's locality and zsRE's loc, brought to flat fields."""
    flat = dict(data)
    rewrite = flat.pop("requested_rewrite", None)
    if isinstance(rewrite, Mapping):
        columns.renamed.setdefault("requested_rewrite", "subject, prompt, answer, target")
        flat.update(rewrite)
        flat.pop("target_new_id", None)
    for name in ("target_new", "target_true", "target_false"):
        value = flat.get(name)
        if isinstance(value, Mapping) and "str" in value:
            flat[name] = value["str"]
    neighbors = flat.get("neighborhood_prompts")
    if isinstance(neighbors, list) and "target_true" in flat and all(isinstance(n, str) for n in neighbors):
        # CounterFact's neighborhood: other subjects that have the same true object.
        del flat["neighborhood_prompts"]
        columns.renamed.setdefault("neighborhood_prompts", "neighbors")
        flat["neighbors"] = [{"prompt": n, "answer": flat["target_true"]} for n in neighbors]
    if isinstance(flat.get("loc"), str) and isinstance(flat.get("loc_ans"), str):
        columns.renamed.setdefault("loc", "neighbors")
        prompt, answer = str(flat.pop("loc")), flat.pop("loc_ans")
        flat["neighbors"] = [{"prompt": prompt.removeprefix("nq question: "), "answer": answer}]
    return flat


def known_fields() -> str:
    """The names to offer in a message."""
    return ", ".join(_OWN)
