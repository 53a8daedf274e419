"""The reference for relearning: facts that a model never knew, taught by half in the same way.

Fine-tuning on half of some facts teaches a model what the answers look like, and it then guesses some of the others,
whether it ever knew them or not. Only what comes back beyond that was still in the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.evaluation.probes import Decoding
from editunlearn.evaluation.scoring import MARGIN, NEW_TOKENS
from editunlearn.evaluation.suites import Part
from editunlearn.evaluation.suites.facts import probe
from editunlearn.facts.readers import comparable, load_facts

if TYPE_CHECKING:
    from editunlearn.evaluation.treatments import Treatment
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM


def load_unknown(
    place: str, facts: Sequence[Fact], treatments: Sequence[Treatment], *, data_root: Path | None, limit: int | None
) -> list[Fact]:
    """The facts of ``--unknown``.

    Args:
        facts: that were to be forgotten, which the model did know.
        treatments: at least one of which must be a relearning.

    Raises:
        InputError: nothing is relearned, there are too few, or one of them is about a subject of ``facts``.
    """
    if not any(treatment.relearn for treatment in treatments):
        raise InputError(f"--unknown {place} is what relearning is compared with: give --under relearn as well.")
    found = load_facts(place, data_root=data_root)[:limit]
    if len(found) < 2:
        raise InputError(f"--unknown {place}: {len(found)} facts; at least 2, half are taught and half are asked.")
    forgotten = {comparable(fact.subject) for fact in facts}
    both = [fact for fact in found if comparable(fact.subject) in forgotten]
    if both:
        raise InputError(
            f"--unknown {place}: {both[0].subject!r} is a subject of --facts as well ({len(both)} of {len(found)} "
            "facts). Give facts about others, which the unedited model cannot answer."
        )
    return found


def asked_part(lm: LM, name: str, facts: Sequence[Fact]) -> Part:
    """``facts`` asked in their own words: those that a model never knew, or those that it was just taught."""
    longest = (
        max(len(lm.tokenizer(fact.answer, add_special_tokens=False)["input_ids"]) for fact in facts) if facts else 0
    )
    decoding = Decoding(max(NEW_TOKENS, longest + MARGIN))
    return Part(name, [probe(lm, fact, fact.prompt) for fact in facts], ("leak", "answer_probability"), decoding)
