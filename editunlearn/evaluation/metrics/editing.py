"""The words of the editing literature, turned to forgetting: what is measured teacher-forced, and what by decoding."""

from __future__ import annotations

from editunlearn.evaluation.metrics import Definition

_TF = "teacher-forced: wrong answers likelier than the true one (CounterFact, mean over tokens), or tokens of the true "
DEFINITIONS = (
    Definition(
        "efficacy_tf", "higher", 0, 1, f"{_TF}answer that are not the argmax (zsRE, facts), on the facts' own prompts"
    ),
    Definition("efficacy_gen", "higher", 0, 1, "share of own prompts whose decoded text does not leak the answer"),
    Definition("generalization_tf", "higher", 0, 1, "as efficacy_tf, on paraphrases"),
    Definition("generalization_gen", "higher", 0, 1, "as efficacy_gen, on paraphrases"),
    Definition(
        "locality_tf",
        "higher",
        0,
        1,
        "teacher-forced, on prompts beside: true answer likelier than the new one (CounterFact), or share of its "
        "tokens that are the argmax (zsRE, facts)",
        "ROME, arXiv 2202.05262; MEND, arXiv 2110.11309",
        "measured against the true answer, not against what the unedited model says: see its own column.",
    ),
    Definition("locality_gen", "higher", 0, 1, "share of prompts beside whose decoded text has the true answer"),
    Definition(
        "portability_tf",
        "higher",
        0,
        1,
        "as locality_tf, on questions that take one more step from the new answer (zsRE with portability)",
        "arXiv 2305.13172",
        "only for edits to new answers (--targets counterfactual): from a refusal nothing follows.",
    ),
    Definition("portability_gen", "higher", 0, 1, "share of those questions whose decoded text has their answer"),
)
