"""EDU-RELAT (Wu et al. 2024, arXiv 2410.15153): family relations that follow from each other.

``edu-relat:FILE`` reads JSON: ``facts`` (a list of subject, relation, object, question, answer), ``rules`` (each with
``if``, a list of [variable, relation, variable], and ``then``) and ``targets`` (numbers of facts). The published files
are pickles, which can run anything when they are opened; convert them where you trust them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.evaluation.metrics.closure import Rule, Triple, closure, deep_unlearning
from editunlearn.evaluation.probes import Decoding, Probe
from editunlearn.evaluation.results import Item, Measured, Value
from editunlearn.evaluation.suites import Part, Source
from editunlearn.lm.tokens import wrap

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

TOKENS = Decoding(16, ("\n",))


@dataclass(frozen=True)
class Relations:
    """Triples with their questions and answers, the rules, and which triples are targets."""

    facts: tuple[Triple, ...]
    asked: tuple[tuple[str, str], ...]
    rules: tuple[Rule, ...]
    targets: tuple[int, ...]


def read(which: str, source: Source) -> Relations:  # noqa: ARG001 - as all suites
    """The file behind the colon."""
    if not which:
        raise InputError("edu-relat: name the file: edu-relat:relations.json (see its form in suites/edu_relat.py).")
    path = Path(which)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        facts = tuple((str(f["subject"]), str(f["relation"]), str(f["object"])) for f in raw["facts"])
        asked = tuple((str(f["question"]), str(f["answer"])) for f in raw["facts"])
        rules = tuple(Rule(tuple(_triple(c) for c in r["if"]), _triple(r["then"])) for r in raw["rules"])
        targets = tuple(int(number) for number in raw["targets"])
    except FileNotFoundError:
        raise InputError(f"edu-relat: {which}: no such file.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"edu-relat: {which}: not of the form that suites/edu_relat.py describes: {error!r}."
        ) from None
    if not facts or not targets:
        raise InputError(
            f"edu-relat: {which}: it has {len(facts)} facts and {len(targets)} targets; at least one of each."
        )
    missing = closure(facts, rules) - set(facts)
    if missing:
        raise InputError(f"edu-relat: {which}: {sorted(missing)[0]} follows by the rules, but is no fact of the file.")
    wrong = [number for number in targets if not 0 <= number < len(facts)]
    if wrong:
        raise InputError(f"edu-relat: {which}: target {wrong[0]} is not the number of one of {len(facts)} facts.")
    return Relations(facts, asked, rules, targets)


def _triple(value: list[str]) -> Triple:
    one, relation, other = value
    return str(one), str(relation), str(other)


def parts(lm: LM, data: Relations) -> list[Part]:
    """Every fact asked; the rules and targets go along as text, so that totals need nothing else."""
    probes = []
    for triple, (question, answer) in zip(data.facts, data.asked, strict=True):
        prompt = wrap(lm, question, (0, len(question)), question=True)
        probes.append(Probe(prompt, question, answer, subject=triple[0], group=json.dumps(triple)))
    told = [Probe(None, json.dumps([*rule.body, rule.head]), "", group="rule") for rule in data.rules]
    told += [Probe(None, str(number), "", group="target") for number in data.targets]
    return [Part("relations", probes, ("leak", "refusal", "answer_probability"), TOKENS), Told("rules", told, ())]


@dataclass
class Told(Part):
    """What is not asked but must be known to make the totals."""

    @property
    def looks(self) -> int:
        """See :class:`Part`."""
        return 0

    def items(self, lm: LM, progress: Callable[[int], None]) -> list[Item]:  # noqa: ARG002 - as all parts
        """See :class:`Part`."""
        return [Item(probe.shown, "", None, probe.group, {}) for probe in self.probes]


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:  # noqa: ARG001 - as all suites
    """Means over the targets. What the model never knew counts as lost: read them beside the unedited model's."""
    items = measured.parts["relations"]
    facts = [_triple(json.loads(item.group)) for item in items]
    lost = [fact for fact, item in zip(facts, items, strict=True) if not item.values["leak"]]
    rules = []
    for item in measured.parts["rules"]:
        if item.group == "rule":
            *body, head = (_triple(part) for part in json.loads(item.shown))
            rules.append(Rule(tuple(body), head))
    targets = [facts[int(item.shown)] for item in measured.parts["rules"] if item.group == "target"]
    found = [deep_unlearning(target, facts, lost, rules) for target in targets]
    return {
        "deep_recall": Value.mean([deep.recall for deep in found]),
        "deep_accuracy": Value.mean([deep.accuracy for deep in found]),
        "deep_success": Value.mean([float(deep.success) for deep in found]),
    }
