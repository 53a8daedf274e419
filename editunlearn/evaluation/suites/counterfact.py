"""CounterFact (Meng et al. 2022, arXiv 2202.05262): true facts with paraphrases and prompts about near subjects.

Here the true object is what is to be forgotten; the counterfactual one is only the answer it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editunlearn.errors import InputError
from editunlearn.evaluation.probes import Decoding, Probe
from editunlearn.evaluation.results import Measured, Value
from editunlearn.evaluation.suites import Part, Record, Source
from editunlearn.evaluation.suites.editing import EFFICACY, GENERALIZATION, LOCALITY, PARTS, editing_totals
from editunlearn.lm.tokens import Prompt

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

HUB = "azhx/counterfact"
METRICS = ("answer_probability", "chosen_mean", "leak", "correct", "refusal")
TOKENS = Decoding(12)
NEEDED = tuple(
    ("requested_rewrite", *path) for path in (("prompt",), ("subject",), ("target_true", "str"), ("target_new", "str"))
)
"""What every case must have."""


def read(which: str, source: Source) -> list[Record]:
    """Cases; ``which`` may be a file in the published format."""
    rows = source.rows(which or HUB, ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"))
    for number, row in enumerate(rows):
        missing = [".".join(path) for path in NEEDED if not _at(row, path)]
        if missing:
            raise InputError(f"counterfact: case {number} has no {missing[0]}.")
    return rows


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def parts(lm: LM, data: Sequence[Record]) -> list[Part]:  # noqa: ARG001 - as all suites
    """The facts, their paraphrases, their neighbours."""
    probes: dict[str, list[Probe]] = {name: [] for name in PARTS}
    for case in data:
        request = case["requested_rewrite"]
        own = str(request["prompt"]).replace("{}", str(request["subject"]))
        asked = {
            EFFICACY: [own],
            GENERALIZATION: case["paraphrase_prompts"],
            LOCALITY: case["neighborhood_prompts"],
        }
        for name, prompts in asked.items():
            probes[name] += [_probe(case, str(prompt)) for prompt in prompts]
    return [Part(name, found, METRICS, TOKENS) for name, found in probes.items() if found]


def _probe(case: Record, prompt: str) -> Probe:
    request = case["requested_rewrite"]
    true, new = (str(request[key]["str"]).strip() for key in ("target_true", "target_new"))
    return Probe(Prompt(prompt, (0, 0)), prompt, true, wrong=(new,), subject=str(request["subject"]))


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:  # noqa: ARG001 - as all suites
    """Teacher-forced and decoded numbers of the editing literature, turned to forgetting; all better when higher."""
    return editing_totals(measured, teacher_forced="chosen_mean", kept="correct")
