"""zsRE (Levy et al. 2017, as packed by MEND, arXiv 2110.11309): questions, rephrased ones, and unrelated ones.

Files with ``portability`` (Yao et al. 2023, arXiv 2305.13172) also have a question one step of reasoning further
from the new answer; it is asked where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.evaluation.probes import Decoding, Probe
from editunlearn.evaluation.results import Measured, Value
from editunlearn.evaluation.suites import Part, Record, Source
from editunlearn.evaluation.suites.editing import EFFICACY, GENERALIZATION, LOCALITY, PORTABILITY, editing_totals
from editunlearn.lm.tokens import wrap

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

METRICS = ("exact_memorization", "answer_probability", "leak", "correct", "refusal")
TOKENS = Decoding(16, ("\n",))
UNRELATED = "nq question: "
"""What stands before the unrelated questions in the published file."""


def read(which: str, source: Source) -> list[Record]:
    """Records of a file in MEND's format, ``zsre:zsre_mend_eval.json``; there is no such dataset on the hub."""
    if not which:
        raise InputError("zsre: name the file: zsre:zsre_mend_eval.json (from https://rome.baulab.info/data/dsets).")
    columns = ("subject", "src", "answers", "rephrase", "loc", "loc_ans")
    return source.rows(which, columns, where=lambda record: bool(record["answers"]))


def parts(lm: LM, data: Sequence[Record]) -> list[Part]:
    """The questions, rephrased, unrelated ones, and ones that follow from the new answer."""

    def probe(record: Record, question: str, answers: Sequence[str]) -> Probe:
        question = question.strip()
        prompt = wrap(lm, question, (0, len(question)), question=True)
        return Probe(prompt, question, answers[0], tuple(answers[1:]), subject=str(record["subject"]))

    asked = {EFFICACY: "src", GENERALIZATION: "rephrase"}
    made = [
        Part(name, [probe(r, str(r[key]), [str(a) for a in r["answers"]]) for r in data], METRICS, TOKENS)
        for name, key in asked.items()
    ]
    unrelated = [probe(r, f"{str(r['loc']).removeprefix(UNRELATED)}?", [str(r["loc_ans"])]) for r in data]
    steps = [r["portability"] for r in data if r.get("portability")]
    further = [
        probe({"subject": ""}, str(step["New Question"]), [str(step["New Answer"])])
        for step in steps
        if step.get("New Question") and step.get("New Answer")
    ]
    beside = {LOCALITY: unrelated, PORTABILITY: further}
    return [*made, *(Part(name, probes, METRICS, TOKENS) for name, probes in beside.items() if probes)]


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:  # noqa: ARG001 - as all suites
    """Efficacy and generalization of forgetting, locality, and portability of new answers; all better when higher."""
    return editing_totals(measured, teacher_forced="exact_memorization", kept="leak")
