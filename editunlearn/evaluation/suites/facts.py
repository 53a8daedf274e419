"""Any file of facts: what is asked of those to forget, and of those that must stay.

``facts`` asks in the words of the file and behind a distracting sentence; ``facts:attacks`` in all the other ways of
:mod:`editunlearn.evaluation.attacks.prompting` too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.errors import InputError
from editunlearn.evaluation.attacks.prompting import ATTACKS, NOT_ASKED, Variant
from editunlearn.evaluation.attacks.splitting import split_subject
from editunlearn.evaluation.metrics import likelihood
from editunlearn.evaluation.probes import Decoding, Probe
from editunlearn.evaluation.results import Item, Measured, Value
from editunlearn.evaluation.scoring import DISTRACTION, MARGIN, NEW_TOKENS
from editunlearn.evaluation.suites import Part, Source
from editunlearn.evaluation.suites.editing import EFFICACY, GENERALIZATION, LOCALITY, editing_totals
from editunlearn.evaluation.suites.inside import Inside
from editunlearn.facts.records import Fact
from editunlearn.lm.head import Head
from editunlearn.lm.likelihood import states_of
from editunlearn.lm.tokens import Prompt, Row, encode, wrap

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

FORGET = ("leak", "refusal", "coherent_refusal", "substitute", "topic_awareness", "answer_probability", "rouge_l")
KEEP = ("correct", "refusal", "answer_probability")
MORE = {
    "forget": ("exact_memorization", "extraction_strength"),
    "paraphrases": ("exact_memorization",),
    "neighbors": ("exact_memorization",),
}
"""Of the same losses, in some parts."""
OPENINGS, OPENING_WORDS, OPENED = 20, 8, Decoding(64)
"""Plain texts that the model goes on with, for its fluency; their first words; how far."""
SAMPLES, TOP_K = 8, 50
"""Tries by sampling, and among how many tokens."""
ATTACK = "attack_"
"""Before the name of an attack: the name of its part."""
UNKNOWN = "unknown"
"""The part of a state that is asked facts which the model never knew; it has no other."""
TAUGHT = "taught"
"""The part that asks what relearning showed: where that was not learned, nothing can have come back by it."""


@dataclass(frozen=True)
class Request:
    """What is asked about.

    Attributes:
        facts: that were to be forgotten.
        retain: that were given to be kept.
        heldout: known facts that no edit saw.
        text: passages for the perplexity.
        attacks: ask in other ways too.
        all_facts, all_retain: the same without a limit, which decide what was held out.
        seed: of sampling, and of what an attack draws.
    """

    facts: Sequence[Fact]
    retain: Sequence[Fact] = ()
    heldout: Sequence[Fact] = ()
    text: Sequence[str] = ()
    attacks: bool = False
    all_facts: Sequence[Fact] = ()
    all_retain: Sequence[Fact] = ()
    seed: int = 0


def read(which: str, source: Source) -> Request:
    """The facts of ``--facts`` and ``--retain``."""
    if which not in ("", "attacks"):
        raise InputError(f"facts:{which}: write facts or facts:attacks, and name the file with --facts.")
    if not source.facts:
        raise InputError("the suite facts needs --facts FILE.")
    facts, retain = source.facts, source.retain
    return Request(
        facts[: source.limit],
        retain[: source.limit],
        attacks=which == "attacks",
        all_facts=facts,
        all_retain=retain,
    )


def parts(lm: LM, data: Request) -> list[Part]:
    """The facts in several wordings, what stands beside them, what must stay, and plain text."""
    facts, said = data.facts, [text for f in data.facts for text in (f.answer, f.target or "")]
    longest = max(len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said)
    decoding = Decoding(max(NEW_TOKENS, longest + MARGIN))
    asked = {
        "forget": [probe(lm, f, f.prompt) for f in facts],
        "distracted": [probe(lm, f, f.prompt, prefix=DISTRACTION) for f in facts],
        "paraphrases": [probe(lm, f, text) for f in facts for text in f.paraphrases],
        "questions": [probe(lm, f, text, question=True) for f in facts for text in f.other_questions],
    }
    if data.attacks:
        for name in ATTACKS:
            draws = [random.Random(f"{f.id} {data.seed}") for f in facts]
            variants = [(f, v) for f, d in zip(facts, draws, strict=True) for v in ATTACKS[name](f, data.retain, d)]
            found = (_variant(lm, fact, variant) for fact, variant in variants)
            asked[ATTACK + name] = [p for p in dict.fromkeys(found) if p is not None]  # two splits may be the same
    kept = {
        "neighbors": [_neighbor(lm, n.prompt, n.answer) for f in facts for n in f.neighbors],
        "retain": [probe(lm, f, f.prompt) for f in data.retain],
        "heldout": [probe(lm, f, f.prompt) for f in data.heldout],
    }
    made = [Part(name, probes, (*FORGET, *MORE.get(name, ())), decoding) for name, probes in asked.items() if probes]
    if data.attacks:
        drawn = [probe(lm, f, f.prompt) for f in facts for _ in range(SAMPLES)]
        sampled = replace(decoding, top_k=TOP_K, seed=data.seed)
        made.append(Part(f"{ATTACK}sampling", drawn, ("leak", "refusal"), sampled))
        made.append(Inside("inside", asked["forget"], (), text=data.text, blocks=lm.layout.num_layers(lm.model)))
    made += [Part(name, probes, (*KEEP, *MORE.get(name, ())), decoding) for name, probes in kept.items() if probes]
    known = [*kept["retain"], *kept["heldout"]]
    if known:
        made.append(Shift("shift", known, ("kl",)))
    if data.text:
        made.append(Part("text", [Probe(None, "", text) for text in data.text], ("nll", "tokens")))
        made.append(Part("fluency", [_opening(text) for text in data.text[:OPENINGS]], ("ngram_entropy",), OPENED))
    return made


@dataclass
class Shift(Part):
    """KL(unedited || as it is now) at the answer's tokens, nats a token: how far a model went where it should stay.

    The closing token does not count.
    """

    base: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def looks(self) -> int:
        """See :class:`Part`."""
        return len(self.probes)

    @property
    def looks_before(self) -> int:
        """See :class:`Part`."""
        return len(self.probes)

    def prepare(self, lm: LM, progress: Callable[[int], None]) -> None:
        """Keep the states of the unedited model."""
        self.base = states_of(lm, self._rows(lm), progress)

    def items(self, lm: LM, progress: Callable[[int], None]) -> list[Item]:
        """See :class:`Part`."""
        now, head = states_of(lm, self._rows(lm), progress), Head(lm)
        with torch.no_grad():
            apart = [float(head.kl(was, here).mean()) for was, here in zip(self.base, now, strict=True)]
        return [Item(p.shown, p.answer, None, p.group, {"kl": kl}) for p, kl in zip(self.probes, apart, strict=True)]

    def _rows(self, lm: LM) -> list[Row]:
        rows = [encode(lm, p.prompt, p.answer, "prompt_last") for p in self.probes if p.prompt is not None]
        return [replace(row, ids=row.ids[:-1]) for row in rows]


def probe(lm: LM, fact: Fact, text: str, *, prefix: str = "", question: bool | None = None) -> Probe:
    """A fact asked in the words of ``text``; its id is the group.

    Args:
        question: the text is one; None: if the fact's prompt is.
    """
    asked = fact.is_question if question is None else question
    prompt = wrap(lm, text, (0, len(text)), question=asked, prefix=prefix)
    return Probe(
        prompt, prefix + text, fact.answer, fact.aliases, subject=fact.subject, target=fact.target, group=fact.id
    )


def _variant(lm: LM, fact: Fact, variant: Variant) -> Probe | None:
    """None where the subject's tokens cannot be split."""
    if variant.split is None:
        return probe(lm, fact, variant.prompt, prefix=variant.prefix, question=variant.question)
    subject = (fact.subject_start, fact.subject_end)
    whole = wrap(lm, variant.prompt, subject, question=variant.question, prefix=variant.prefix)
    split = split_subject(lm, whole, variant.split)
    return None if split is None else replace(probe(lm, fact, variant.prompt), prompt=split)


def _opening(text: str) -> Probe:
    shown = " ".join(text.split()[:OPENING_WORDS])
    return Probe(Prompt(shown, (0, len(shown))), shown, "")


def _neighbor(lm: LM, text: str, answer: str) -> Probe:
    return Probe(wrap(lm, text, (0, 0), question=text.endswith("?")), text, answer)


def _editing(measured: Measured) -> dict[str, Value]:
    """The same in the words of the editing literature, of which the facts have prompts."""
    names = {"forget": EFFICACY, "paraphrases": GENERALIZATION, "neighbors": LOCALITY}
    named = Measured({ours: measured.parts[part] for part, ours in names.items() if part in measured.parts})
    return editing_totals(named, teacher_forced="exact_memorization", kept="correct")


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:
    """Short names for what is asked most, what each attack brought back, perplexity, and how like a model that never
    knew this one is."""
    if UNKNOWN in measured.parts:
        return {}
    found: dict[str, Value] = {
        "leak_gen": Value.mean(measured.values("forget", "leak")),
        "over_refusal": Value.mean(
            [value for part in ("neighbors", "retain", "heldout") for value in measured.values(part, "refusal")]
        ),
    }
    found |= _editing(measured)
    attacks = [part for part in measured.parts if part.startswith(ATTACK)]
    for part in dict.fromkeys([*attacks, *(ATTACK + name for name in ATTACKS)] if attacks else ()):
        by_fact: dict[str, float] = {}
        for item in measured.parts.get(part, ()):
            by_fact[item.group] = max(by_fact.get(item.group, 0.0), item.values["leak"])
        reason = NOT_ASKED.get(part.removeprefix(ATTACK), "no fact can be asked in this way")
        found[f"{part}_recovered"] = Value.mean(list(by_fact.values()), reason)
    if "text" in measured.parts:
        found["perplexity"] = Value.perplexity(measured.values("text", "nll"), measured.values("text", "tokens"))
    if reference is not None:
        found |= _likeness(measured, reference)
    return found


def _likeness(measured: Measured, reference: Measured) -> dict[str, Value]:
    """The Kolmogorov-Smirnov test of :func:`likelihood.forget_quality`, of probabilities where facts have no wrong
    answers to make truth ratios of."""
    ours, never = (of.values("forget", "answer_probability") for of in (measured, reference))
    names = ("forget_likeness", "forget_likeness_ks")
    if not ours or len(ours) != len(never):
        return dict.fromkeys(names, Value(None, reason=f"{len(ours)} items here, {len(never)} in the reference"))
    test = likelihood.forget_quality(ours, never)
    note = f"p-value, n = {test.items} against {test.reference_items}"
    return dict(zip(names, (Value(test.p_value, items=test.items, reason=note), Value(test.statistic)), strict=True))
