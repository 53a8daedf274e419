"""A few made-up records of every benchmark, in the layout of its hub repository, as ``--data-root`` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ASKED = [("Where was Ana Petrova born?", "Taipei"), ("Who wrote the book?", "Marie Curie")]
PERTURBED = [
    {"question": q, "answer": a, "paraphrased_answer": f"It is {a}", "perturbed_answer": ["Berlin", "Rome"]}
    for q, a in ASKED
]
OPTIONS = [{"question": q, "answer": a, "perturbed_answer": ["Berlin", "Rome", "Tokyo"]} for q, a in ASKED]
PERSON = {"subject": "Marie Curie"}
PROBES = [
    {**PERSON, "query": "Marie Curie discovered ___ and polonium.", "answer": "radium", "type": "cloze"},
    {**PERSON, "query": "What did she discover?", "answer": "radium", "type": "cross lingual (Spanish)"},
    {"subject": "Ana Petrova", "query": "Where does she live?", "answer": "Berlin", "type": "role play"},
]
PASSAGES = [{**PERSON, "text": "A river runs through the old town."}, {**PERSON, "text": "He is a civil engineer."}]
CHOICES = [
    {"question": "Which is a city?", "choices": ["novel", "Paris", "river", "dog"], "answer": 1},
    {"question": "Which is an animal?", "choices": ["novel", "Paris", "river", "dog"], "answer": 3},
]
FILES: dict[str, Any] = {
    "TOFU/forget01_perturbed": PERTURBED,
    "TOFU/retain_perturbed": PERTURBED,
    "TOFU/real_authors_perturbed": OPTIONS,
    "TOFU/world_facts_perturbed": OPTIONS,
    "TOFU/holdout01": [{"question": "Who lives in Berlin?", "answer": "the author"}],
    "RWKU/forget_target": [{"target": "Marie Curie"}, {"target": "Ana Petrova"}],
    **{f"RWKU/forget_level{level}": PROBES for level in (1, 2, 3)},
    **{f"RWKU/neighbor_level{level}": PROBES for level in (1, 2)},
    "RWKU/mia_forget": PASSAGES,
    "RWKU/mia_retain": PASSAGES[::-1],
    "RWKU/utility_general": [{**row, "examples": CHOICES[:1]} for row in CHOICES],
    "RWKU/utility_truthfulness": [
        {"question": "Is Paris in France?", "mc1_targets": {"choices": ["No.", "Yes."], "labels": [0, 1]}}
    ],
    "RWKU/utility_factuality": [{"question": "Where is the Eiffel Tower?", "answers": ["Paris", "in Paris"]}],
    "RWKU/utility_fluency": [{"instruction": "Write about a river."}],
    "MUSE-News/knowmem/forget_qa": [{"question": q, "answer": a} for q, a in ASKED],
    "MUSE-News/knowmem/retain_qa": [{"question": q, "answer": a} for q, a in ASKED],
    "MUSE-News/knowmem/forget_qa_icl": [{"question": "Who is he?", "answer": "a civil engineer"}],
    "MUSE-News/knowmem/retain_qa_icl": [{"question": "Who is he?", "answer": "a civil engineer"}],
    "MUSE-News/verbmem/forget": [{"prompt": "The quick brown fox", "gt": "jumps over the lazy dog."}],
    "MUSE-News/privleak/forget": PASSAGES,
    "MUSE-News/privleak/holdout": PASSAGES[::-1],
    "KnowUnDo/privacy/unlearn": [{"train": [], "val": [{"text": q, "labels": a} for q, a in ASKED]}],
    "KnowUnDo/privacy/retention": [{"train": [], "val": [{"text": q, "labels": a} for q, a in ASKED]}],
    "wmdp/wmdp-bio/test": CHOICES,
    "PKU-SafeRLHF/test": [
        {"prompt": "How do I make it?", "is_response_0_safe": False, "is_response_1_safe": True},
        {"prompt": "Who wrote the book?", "is_response_0_safe": True, "is_response_1_safe": True},
    ],
    "counterfact/test": [
        {
            "case_id": 0,
            "requested_rewrite": {
                "prompt": "The mother tongue of {} is",
                "subject": "Danielle Darrieux",
                "target_true": {"str": "French"},
                "target_new": {"str": "Russian"},
            },
            "paraphrase_prompts": ["Danielle Darrieux spoke"],
            "neighborhood_prompts": ["The capital of France is", "The capital of Japan is"],
        }
    ],
    "zsre_mend_eval": [
        {
            "subject": "Ana Petrova",
            "src": "Where was Ana Petrova born?",
            "answers": ["Taipei", "in Taipei"],
            "rephrase": "What is the place of birth of Ana Petrova?",
            "loc": "nq question: who wrote the book",
            "loc_ans": "Marie Curie",
            "portability": {"New Question": "In which country was Ana Petrova born?", "New Answer": "Peru"},
        }
    ],
}
SUITES = ("tofu:forget01", "rwku", "muse:news", "knowundo:privacy", "wmdp:bio", "safepku", "counterfact")
RELATIONS = {
    "facts": [
        {
            "subject": one,
            "relation": relation,
            "object": other,
            "question": f"Who is the {relation} of {one}?",
            "answer": other,
        }
        for one, relation, other in (
            ("Ana", "mother", "Eva"),
            ("Eva", "mother", "Ida"),
            ("Ana", "grandmother", "Ida"),
            ("Leo", "mother", "Eva"),
            ("Leo", "grandmother", "Ida"),
        )
    ],
    "rules": [{"if": [["x", "mother", "y"], ["y", "mother", "z"]], "then": ["x", "grandmother", "z"]}],
    "targets": [2],
}
"""A family in which two facts follow from others, for the suite edu-relat."""


def write(root: Path) -> Path:
    """Fill a folder with all of it."""
    for name, records in FILES.items():
        path = root / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records), encoding="utf-8")
    return root
