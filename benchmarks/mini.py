"""A small TOFU: some authors to stay, two to forget, in the layout that the suite ``tofu:forget01`` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.facts.sources import read_rows

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact

HUB = "locuslab/TOFU"


def write(data: Path, out: Path, authors: int, questions: int, shown: int, others: int) -> dict[str, int]:
    """Write what is taught, forgotten and given to keep as facts, and what is asked; what is there stays as it is.

    The authors that stay are the first of ``retain_perturbed``, which has wrong answers for them; those that are
    forgotten are all of ``forget01_perturbed``. Of the authors that stay, some are given to the methods; the suite asks
    the others, so that no method was shown what its model utility is about.

    Args:
        data: folder of TOFU. out: new folder.
        authors: that stay, of so many ``questions``; ``shown`` of them are given to the methods.
        others: questions of each other part of the suite.

    Returns:
        how many there are of each.

    Raises:
        SystemExit: fewer than asked for.
    """

    def rows(name: str) -> list[dict[str, Any]]:
        return [dict(row.data) for row in read_rows(f"{HUB}:{name}", data_root=data).rows]

    stay, forget = rows("retain_perturbed")[: authors * questions], rows("forget01_perturbed")
    if not 0 < shown < authors or len(stay) < authors * questions:
        raise SystemExit(
            f"--authors {authors} --shown {shown}: 0 < shown < authors, and {len(stay)} questions are there."
        )
    given, asked = stay[: shown * questions], stay[shown * questions :]
    facts = {"taught": [*stay, *forget], "forget": forget, "retain": given}
    for name, records in facts.items():
        lines = [_fact(record, paraphrased=name == "forget") for record in records]
        write_lines(out / f"{name}.jsonl", lines)
    suite = {"retain_perturbed": spread(asked, others), "forget01_perturbed": forget}
    suite |= {name: rows(name)[:others] for name in ("real_authors_perturbed", "world_facts_perturbed")}
    suite["holdout01"] = rows("holdout01")[: len(forget)]
    for name, records in suite.items():
        atomic_write_json(out / "TOFU" / f"{name}.json", records)
    return {**{name: len(records) for name, records in facts.items()}, **{n: len(r) for n, r in suite.items()}}


def spread(records: Sequence[Any], count: int) -> list[Any]:
    """So many of them, evenly."""
    return [records[i * len(records) // count] for i in range(count)] if count < len(records) else list(records)


def _fact(row: dict[str, Any], *, paraphrased: bool) -> dict[str, Any]:
    again = row.get("paraphrased_question") if paraphrased else None
    return {"question": row["question"], "answer": row["answer"], **({"paraphrases": [again]} if again else {})}


def record(fact: Fact) -> dict[str, Any]:
    """A fact as a line of a file of facts."""
    words = {"id": fact.id, "subject": fact.subject, "prompt": fact.prompt, "answer": fact.answer}
    return {**words, "paraphrases": list(fact.paraphrases), "aliases": list(fact.aliases)}


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """A JSONL file."""
    atomic_write_text(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
