"""RWKU (Jin et al. 2024, arXiv 2406.10890): forget real people; ``rwku:NAME,NAME`` are some of them.

Forget and neighbour probes are scored by ROUGE-L recall of 30 greedy tokens, as published; the published prompts differ
by model, so numbers are comparable between models measured here, and with the paper's only roughly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.evaluation.probes import Decoding, Probe
from editunlearn.evaluation.results import Measured, Value
from editunlearn.evaluation.suites import Part, Record, Source
from editunlearn.evaluation.suites.choice import check_choices, choice_probe
from editunlearn.evaluation.suites.membership import SCORES
from editunlearn.lm.tokens import Prompt, wrap
from editunlearn.naming import did_you_mean

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

HUB = "jinzhuoran/RWKU"
QUESTIONS = {
    "fill_blank": "forget_level1",
    "question": "forget_level2",
    "adversarial": "forget_level3",
    "neighbor_fill_blank": "neighbor_level1",
    "neighbor_question": "neighbor_level2",
}
FILL = "Fill in the blank (___) of this sentence: "
SHORT = Decoding(30, ("\n",))
FLUENCY = Decoding(100)


def read(which: str, source: Source) -> dict[str, list[Record]]:
    """Records by part, all people or those that ``which`` names; the utility sets are about nobody."""
    named = _named(which, source)

    def of_person(record: Record) -> bool:
        return not named or record.get("subject") in named

    asked = ("query", "answer", "subject")
    found = {name: source.rows(f"{HUB}:{place}", asked, where=of_person) for name, place in QUESTIONS.items()}
    for name in ("mia_forget", "mia_retain"):
        found[name] = source.optional(f"{HUB}:{name}", ("text", "subject"), where=of_person)
    columns = {
        "utility_general": ("question", "choices", "answer"),
        "utility_truthfulness": ("question", "mc1_targets"),
        "utility_factuality": ("question", "answers"),
        "utility_fluency": ("instruction",),
    }
    found |= {name: source.optional(f"{HUB}:{name}", names) for name, names in columns.items()}
    check_choices(found["utility_general"], f"{HUB}:utility_general")
    return found


def _named(which: str, source: Source) -> frozenset[str]:
    """The people behind the colon, with commas between them; none: all people."""
    if not which:
        return frozenset()
    people = {str(record["target"]) for record in source.whole.rows(f"{HUB}:forget_target", ("target",))}
    names = [which] if which in people else [name.strip() for name in which.split(",")]  # a name may have a comma
    unknown = [name for name in names if name not in people]
    if unknown:
        raise InputError([f"rwku:{which}: no such person: {name!r}.{did_you_mean(name, people)}" for name in unknown])
    return frozenset(names)


def parts(lm: LM, data: Mapping[str, Sequence[Record]]) -> list[Part]:
    """Forget and neighbour probes, membership inference, utility."""
    text = ("rouge_l", "leak", "refusal", "coherent_refusal")
    made = [Part(name, [_question(lm, r) for r in data[name]], text, SHORT) for name in QUESTIONS]
    for name in ("mia_forget", "mia_retain"):
        if data[name]:
            made.append(
                Part(name, [Probe(None, "", str(r["text"])) for r in data[name]], (*SCORES, "min_20_plus_plus"))
            )
    utility = {
        "utility_general": (partial(_general, lm), ("chosen",), SHORT),
        "utility_truthfulness": (partial(_truthful, lm), ("chosen",), SHORT),
        "utility_factuality": (partial(_factual, lm), ("exact_match", "word_f1", "leak"), SHORT),
        "utility_fluency": (partial(_fluent, lm), ("ngram_entropy",), FLUENCY),
    }
    for name, (probe, metrics, decoding) in utility.items():
        if data[name]:
            made.append(Part(name, [probe(record) for record in data[name]], metrics, decoding))
    return made


def _asked(lm: LM, text: str) -> Prompt:
    return wrap(lm, text, (0, len(text)), question=True)


def _question(lm: LM, record: Record) -> Probe:
    text = str(record["query"]).strip()
    prompt = _asked(lm, FILL + text if "___" in text else text)
    kind = str(record.get("type", "")).partition(" (")[0]
    return Probe(prompt, text, str(record["answer"]), subject=str(record["subject"]), group=kind)


def _general(lm: LM, record: Record) -> Probe:
    return choice_probe(lm, record, examples=record.get("examples") or ())


def _truthful(lm: LM, record: Record) -> Probe:
    options = record["mc1_targets"]
    right = options["choices"][options["labels"].index(1)]
    wrong = [text for text in options["choices"] if text != right]
    text = str(record["question"]).strip()
    return Probe(_asked(lm, text), text, right, wrong=tuple(wrong))


def _factual(lm: LM, record: Record) -> Probe:
    text, answers = str(record["question"]).strip(), [str(answer) for answer in record["answers"]]
    return Probe(_asked(lm, text), text, answers[0], tuple(answers[1:]))


def _fluent(lm: LM, record: Record) -> Probe:
    text = str(record["instruction"]).strip()
    return Probe(_asked(lm, text), text, "")


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:  # noqa: ARG001 - as all suites
    """Means over the probes of a kind as published, adversarial probes by type.

    Passages of both membership sets were trained on: their losses are read each for itself, the forget set's should
    rise and the other's stay.
    """
    found: dict[str, Value] = {}
    for name, own in {
        "forget_all": ("fill_blank", "question", "adversarial"),
        "neighbor_all": ("neighbor_fill_blank", "neighbor_question"),
    }.items():
        found[f"{name}_rouge_l"] = Value.mean_of_means([measured.values(part, "rouge_l") for part in own])
    for kind in sorted({item.group for item in measured.parts.get("adversarial", ())}):
        name = f"adversarial.{kind.replace(' ', '_')}.rouge_l"
        found[name] = Value.mean(measured.values("adversarial", "rouge_l", kind))
    return found
