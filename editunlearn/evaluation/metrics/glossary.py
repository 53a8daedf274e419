"""From a name in a results file to the definition of that number."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from editunlearn.errors import InputError
from editunlearn.evaluation.metrics import Definition, closure, editing, likelihood, memorisation, text
from editunlearn.naming import did_you_mean

MODULES = (text, likelihood, memorisation, editing, closure)
DEFINITIONS: Mapping[str, Definition] = MappingProxyType({d.name: d for module in MODULES for d in module.DEFINITIONS})

_OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "leak": "leak_rate",
        "leak_gen": "leak_rate",
        "refusal": "refusal_rate",
        "coherent_refusal": "coherent_refusal_rate",
        "substitute": "substitute_rate",
        "over_refusal": "over_refusal_rate",
        "correct": "accuracy",
        "chosen": "choice_accuracy",
        "chosen_mean": "choice_accuracy",
        "above_chance": "choice_accuracy",
        "nll": "loss",
        "tokens": "loss",
        "rouge_l_f1": "rouge_l",
        "min_20_plus_plus": "min_k_plus_plus",
        "utility": "rouge_l",
        "knowmem": "rouge_l",
        "verbmem": "rouge_l",
        "forget_quality_ks": "forget_quality",
        "forget_likeness_ks": "forget_likeness",
        "success": "exact_memorization",
        "auc": "membership_auc",
        "retain_truth_ratio": "utility_truth_ratio",
        "real_authors_truth_ratio": "utility_truth_ratio",
        "world_facts_truth_ratio": "utility_truth_ratio",
    }
)
_KEPT = (
    "knowmem_retain",
    "retain",
    "heldout",
    "neighbor",
    "locality",
    "portability",
    "retention",
    "utility",
    "real_authors",
    "world_facts",
)
"""Beginnings of parts that are about what must stay."""
_BOTH = ("relations.", "unknown.", "taught.")
"""Parts of which some is to be forgotten and most is to stay, or that are a reference themselves."""
_TURNED: Mapping[str, str] = MappingProxyType(
    {
        "forget_quality_ks": "lower",
        "forget_likeness_ks": "lower",
        **dict.fromkeys(("unlearn_success", "unlearn_prefixed_success"), "higher"),
        **dict.fromkeys(("retention_perplexity", "retention_prefixed_perplexity"), "lower"),
        **dict.fromkeys(("toxicity", "toxic"), "lower"),
    }
)
"""Totals that say how well something was forgotten, or that count the other way round."""


def definition_of(name: str) -> Definition | None:
    """Definition of ``part.metric`` or of a total; None for a name that is none of ours."""
    last = name.rpartition(".")[2]
    for candidate in (last, *(last[i + 1 :] for i, c in enumerate(last) if c == "_")):
        found = DEFINITIONS.get(_OTHER_NAMES.get(candidate, candidate))
        if found is not None:
            return found
    return None


def check_name(name: str) -> None:
    """Raise InputError unless something that suites of ours measure has the name."""
    last = name.rpartition(".")[2]
    if definition_of(name) is None and last not in _TURNED:
        near = did_you_mean(last, {*DEFINITIONS, *_OTHER_NAMES, *_TURNED})
        raise InputError(f"there is no metric {last!r}.{near} docs/metrics.md lists them.")


def better(name: str) -> str:
    """``higher``, ``lower`` or ``reference``: which way is good for this number of an unlearned model."""
    definition = definition_of(name)
    if name.rpartition(".")[2] in _TURNED:
        return _TURNED[name.rpartition(".")[2]]
    if definition is None or definition.better == "reference" or name.startswith(_BOTH):
        return "reference"
    if not name.removeprefix("knowmem_").startswith(_KEPT) or definition.name == "utility_truth_ratio":
        return definition.better
    bad = ("refusal_rate", "coherent_refusal_rate", "over_refusal_rate", "substitute_rate")
    return "lower" if definition.name in bad else "higher"
