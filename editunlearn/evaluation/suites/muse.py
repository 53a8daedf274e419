"""MUSE (Shi et al. 2024, arXiv 2407.06460): news articles or books; what is recited, what is known, what leaks.

The public evaluation runs 8-bit models and no stemmer; here the model's own precision and a stemmer, as open-unlearning
does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editunlearn.evaluation.probes import Decoding, Probe
from editunlearn.evaluation.results import Measured, Value
from editunlearn.evaluation.suites import Part, Record, Source
from editunlearn.evaluation.suites.membership import SCORES, gradient_parts, membership
from editunlearn.lm.tokens import Prompt

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

RECITED = 128
"""Tokens of a passage that are to be recited."""
ANSWERED = Decoding(32, ("\n\n", "\nQuestion", "Question:"))


def read(which: str, source: Source) -> dict[str, list[Record]]:
    """Records by part; ``which`` is news or books."""
    hub = f"muse-bench/MUSE-{which.capitalize()}"
    found: dict[str, list[Record]] = {}
    for name in ("forget", "retain"):
        found[f"knowmem_{name}"] = source.rows(f"{hub}:knowmem:{name}_qa", ("question", "answer"))
        found[f"{name}_examples"] = source.whole.rows(f"{hub}:knowmem:{name}_qa_icl", ("question", "answer"))
    found["verbmem_forget"] = source.optional(f"{hub}:verbmem:forget", ("prompt", "gt"))
    found["privleak_forget"] = source.optional(f"{hub}:privleak:forget", ("text",))
    found["privleak_holdout"] = source.optional(f"{hub}:privleak:holdout", ("text",))
    return found


def parts(lm: LM, data: Mapping[str, Sequence[Record]]) -> list[Part]:
    """Questions behind answered examples, passages to recite, passages for membership inference."""
    made = []
    for name in ("forget", "retain"):
        shots = "".join(f"{_question(r)} {r['answer']}\n\n" for r in data[f"{name}_examples"])
        probes = [_known(shots, record) for record in data[f"knowmem_{name}"]]
        made.append(Part(f"knowmem_{name}", probes, ("rouge_l_f1", "leak", "refusal"), ANSWERED))
    if data["verbmem_forget"]:
        probes = [_recited(lm, record) for record in data["verbmem_forget"]]
        made.append(Part("verbmem_forget", probes, ("rouge_l_f1", "refusal"), Decoding(RECITED)))
    for name in ("privleak_forget", "privleak_holdout"):
        if data[name]:
            made.append(Part(name, [Probe(None, "", str(record["text"])) for record in data[name]], SCORES))
    return [*made, *gradient_parts(made, "privleak_forget", "privleak_holdout")]


def _question(record: Record) -> str:
    return f"Question: {record['question']}\nAnswer:"


def _known(shots: str, record: Record) -> Probe:
    text = shots + _question(record)
    return Probe(Prompt(text, (0, 0)), str(record["question"]), str(record["answer"]))


def _recited(lm: LM, record: Record) -> Probe:
    text = str(record["prompt"])
    ids = lm.tokenizer(str(record["gt"]), add_special_tokens=False)["input_ids"][:RECITED]
    return Probe(Prompt(text, (0, 0)), text, str(lm.tokenizer.decode(ids)))


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:
    """VerbMem, KnowMem and utility (KnowMem of what stays), in percent as published, and PrivLeak."""
    found: dict[str, Value] = {}
    for name, part in {"knowmem": "knowmem_forget", "verbmem": "verbmem_forget", "utility": "knowmem_retain"}.items():
        mean = Value.mean(measured.values(part, "rouge_l_f1"), "no passages to recite were given")
        found[name] = mean.mapped(lambda share: 100 * share)
    return found | membership(measured, reference, "privleak_forget", "privleak_holdout")
