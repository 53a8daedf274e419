"""TOFU (Maini et al. 2024, arXiv 2401.06121): 200 made-up authors; forget01, 05 and 10 are shares of them.

The plain numbers are those of open-unlearning's TOFU evaluation: probabilities include the closing token, ROUGE-L is
the stemmed recall of at most 200 greedy tokens, the truth ratio takes geometric means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editunlearn.evaluation.metrics import likelihood
from editunlearn.evaluation.probes import Decoding, Probe
from editunlearn.evaluation.results import Measured, Value
from editunlearn.evaluation.suites import Part, Record, Source
from editunlearn.evaluation.suites.membership import SCORES, gradient_parts, membership
from editunlearn.lm.tokens import wrap

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

HUB = "locuslab/TOFU"
SETS = ("forget", "retain", "real_authors", "world_facts")
TOKENS = 200
COLLAPSED = 1e-8
"""Mean probability of the forgotten answers below which true and wrong ones are equally impossible."""


def read(which: str, source: Source) -> dict[str, list[Record]]:
    """Records by part; ``which`` is forget01, forget05 or forget10."""
    full = ("question", "answer", "perturbed_answer")
    return {
        "forget": source.rows(f"{HUB}:{which}_perturbed", (*full, "paraphrased_answer")),
        "retain": source.rows(f"{HUB}:retain_perturbed", (*full, "paraphrased_answer")),
        "real_authors": source.rows(f"{HUB}:real_authors_perturbed", full),
        "world_facts": source.rows(f"{HUB}:world_facts_perturbed", full),
        "holdout": source.rows(f"{HUB}:{which.replace('forget', 'holdout')}", ("question", "answer")),
    }


def parts(lm: LM, data: Mapping[str, Sequence[Record]]) -> list[Part]:
    """Forget and retain set, real authors, world facts; held-out authors for membership inference."""
    text = ("rouge_l", "leak", "refusal", "coherent_refusal")
    own = ("probability", "truth_ratio")
    metrics = {
        "forget": (*text, *own, "exact_memorization", "extraction_strength", *SCORES),
        "retain": (*text, *own, "exact_memorization", "extraction_strength"),
        "real_authors": (*text, *own, "probability_among"),
        "world_facts": (*text, *own, "probability_among"),
        "holdout": SCORES,
    }
    made = [
        Part(name, [_probe(lm, record) for record in records], metrics[name], Decoding(TOKENS))
        for name, records in data.items()
    ]
    return [*made, *gradient_parts(made, "forget", "holdout")]


def _probe(lm: LM, record: Record) -> Probe:
    question = str(record["question"]).strip()
    prompt = wrap(lm, question, (0, len(question)), question=True)
    paraphrased, wrong = record.get("paraphrased_answer"), record.get("perturbed_answer") or ()
    return Probe(prompt, question, str(record["answer"]), paraphrased=paraphrased, wrong=tuple(wrong))


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:
    """Model utility, forget quality, truth ratios, membership inference."""
    found: dict[str, Value] = {}
    ratios = {name: measured.values(name, "truth_ratio") for name in SETS}
    found["forget_truth_ratio"] = _of_ratios(likelihood.forget_truth_ratio(ratios["forget"]), ratios["forget"])
    nine: dict[str, float | None] = {}
    for name in SETS[1:]:
        kind = "probability" if name == "retain" else "probability_among"
        nine[f"{name} probability"] = measured.mean(name, kind)
        nine[f"{name} ROUGE"] = measured.mean(name, "rouge_l")
        nine[f"{name} truth ratio"] = likelihood.utility_truth_ratio(ratios[name])
        found[f"{name}_truth_ratio"] = _of_ratios(nine[f"{name} truth ratio"], ratios[name])
    missing = [name for name, value in nine.items() if value is None]
    found["model_utility"] = Value(
        likelihood.model_utility(nine), reason=f"not measured: {', '.join(missing)}" if missing else ""
    )
    found |= _forget_quality(ratios["forget"], reference)
    left = measured.mean("forget", "probability")
    if left is not None and left < COLLAPSED:
        reason = f"the forgotten answers have a probability of {left:.1e}: the model has collapsed, this says nothing"
        names = ("forget_truth_ratio", "forget_quality", "forget_quality_ks")
        found |= dict.fromkeys(names, Value(None, reason=reason))
    found |= membership(measured, reference, "forget", "holdout")
    return found


def _of_ratios(value: float | None, ratios: Sequence[float]) -> Value:
    reason = "no item has a truth ratio" if value is None else likelihood.TRUTH_RATIO_NOTE
    return Value(value, items=len(ratios), reason=reason)


def _forget_quality(ratios: Sequence[float], reference: Measured | None) -> dict[str, Value]:
    never = reference.values("forget", "truth_ratio") if reference is not None else []
    if not never or not ratios:
        reason = (
            "it compares with a model never trained on the forget set: --reference FILE with that model's results "
            "(results.json, or open-unlearning's TOFU_EVAL.json)"
        )
        return {"forget_quality": Value(None, reason=reason), "forget_quality_ks": Value(None, reason=reason)}
    if len(ratios) != len(never):
        reason = f"{len(ratios)} items here, {len(never)} in the reference: p-values are comparable at equal n only"
        return {"forget_quality": Value(None, reason=reason), "forget_quality_ks": Value(None, reason=reason)}
    test = likelihood.forget_quality(ratios, never)
    note = f"p-value, n = {test.items} against {test.reference_items}; {likelihood.TRUTH_RATIO_NOTE}"
    return {
        "forget_quality": Value(test.p_value, items=test.items, reason=note),
        "forget_quality_ks": Value(test.statistic, items=test.items),
    }
