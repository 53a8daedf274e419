"""What a model says about the facts to forget, their paraphrases, and everything that is to stay.

All by greedy decoding; nothing is teacher-forced but the probability of the true answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editunlearn.evaluation.metrics.text import begins_with, leaks, rate
from editunlearn.facts.records import answers
from editunlearn.facts.refusals import is_refusal
from editunlearn.lm.generation import generate
from editunlearn.lm.likelihood import perplexity, score
from editunlearn.lm.tokens import Prompt, encode, wrap

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

DISTRACTION = "The weather in the mountains was cold that day. "
"""Put before a prompt to see whether an edit holds in a context that it was not made in."""
MARGIN = 4
"""Tokens decoded beyond the longest answer, which may be written in more tokens than it is encoded in."""
NEW_TOKENS, FEW_TOKENS = 24, 8
"""Least tokens decoded for each prompt: for a refusal or an answer that comes late, and for what is known to stay."""


@dataclass(frozen=True)
class Answered:
    """What the model did with one prompt.

    Attributes:
        prompt: as the user wrote it.
        expected: the true answer.
        text: the greedy continuation.
        probability: of the true answer, product over its tokens; in [0, 1].
        leaked: the true answer or an alias is somewhere in ``text``.
        correct: ``text`` begins with it.
        refused: ``text`` is a refusal, or what the fact's target says.
    """

    prompt: str
    expected: str
    text: str
    probability: float
    leaked: bool
    correct: bool
    refused: bool


@dataclass(frozen=True)
class Scores:
    """All that is measured of one model. Lists are parallel to the request's; see ``summary`` for the rates."""

    forget: list[Answered]
    distracted: list[Answered]
    paraphrases: list[list[Answered]]
    questions: list[list[Answered]]
    neighbors: list[list[Answered]]
    retain: list[Answered]
    heldout: list[Answered]
    perplexity: float

    def summary(self) -> dict[str, float | None]:
        """Rates in [0, 1] by name, and the perplexity; None where there was nothing to measure."""
        groups = {
            "forget": self.forget,
            "distracted": self.distracted,
            "paraphrase": _flat(self.paraphrases),
            "question": _flat(self.questions),
        }
        rows: dict[str, float | None] = {}
        for name, group in groups.items():
            rows[f"{name}_leak"] = rate([a.leaked for a in group])
            rows[f"{name}_refusal"] = rate([a.refused for a in group])
            rows[f"{name}_probability"] = sum(a.probability for a in group) / len(group) if group else None
        for name, group in {"neighbor": _flat(self.neighbors), "retain": self.retain, "heldout": self.heldout}.items():
            rows[f"{name}_accuracy"] = rate([a.correct for a in group])
            rows[f"{name}_over_refusal"] = rate([a.refused for a in group])
        rows["perplexity"] = self.perplexity
        return rows


def _flat(groups: Sequence[Sequence[Answered]]) -> list[Answered]:
    return [a for group in groups for a in group]


@dataclass(frozen=True)
class Asked:
    """One prompt to be scored."""

    prompt: Prompt
    shown: str
    expected: tuple[str, ...]
    target: str | None = None


def ask(lm: LM, items: Sequence[Asked], *, new_tokens: int = NEW_TOKENS) -> list[Answered]:
    """Decode and score prompts; the result is parallel to ``items``.

    Args:
        new_tokens: least number of tokens to decode; more where an answer or a target is longer.
    """
    said = [text for i in items for text in (*i.expected, i.target or "")]
    longest = max((len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said), default=0)
    texts = generate(lm, [i.prompt for i in items], max_new_tokens=max(new_tokens, longest + MARGIN))
    likely = score(lm, [encode(lm, i.prompt, i.expected[0], "prompt_last") for i in items])
    found = []
    for item, text, likelihood in zip(items, texts, likely, strict=True):
        as_target = bool(item.target) and text.strip().startswith(str(item.target).strip())
        empty = item.target == "" and not text.strip()
        found.append(
            Answered(
                prompt=item.shown,
                expected=item.expected[0],
                text=text,
                probability=math.exp(likelihood.log_probability),
                leaked=leaks(text, item.expected),
                correct=begins_with(text, item.expected),
                refused=as_target or empty or is_refusal(text),
            )
        )
    return found


def asked(lm: LM, fact: Fact, *, prompt: str | None = None, prefix: str = "", question: bool = False) -> Asked:
    """A fact's own prompt, or a paraphrase of it, behind ``prefix``; ``question``: it is asked as one."""
    text = prompt if prompt is not None else fact.prompt
    whole = wrap(lm, text, (0, len(text)), question=question or fact.is_question, prefix=prefix)
    return Asked(whole, prefix + text, answers(fact), fact.target)


def measure(
    lm: LM, facts: Sequence[Fact], retain: Sequence[Fact], heldout: Sequence[Fact], text: Sequence[Sequence[int]]
) -> Scores:
    """Score a model as it is now. Processes (``lm.among``) share the prompts, and each gets all scores.

    Args:
        facts: to forget, with targets.
        retain: to keep, whose prompts the edit may have used.
        heldout: to keep, never shown to any edit.
        text: windows of token ids for the perplexity.
    """
    beside = [
        Asked(wrap(lm, n.prompt, (0, 0), question=n.prompt.endswith("?")), n.prompt, (n.answer,))
        for f in facts
        for n in f.neighbors
    ]
    parts = [
        [asked(lm, f) for f in facts],
        [asked(lm, f, prefix=DISTRACTION) for f in facts],
        [asked(lm, f, prompt=p) for f in facts for p in f.paraphrases],
        [asked(lm, f, prompt=q, question=True) for f in facts for q in f.other_questions],
        beside,
    ]
    # decoded together: a step costs little more for a hundred prompts than for twenty
    whole = lm.among.together([item for part in parts for item in part], lambda share: ask(lm, share))
    forget, distracted, paraphrases, questions, neighbors = _grouped(whole, list(map(len, parts)))
    kept = [[asked(lm, f) for f in group] for group in (retain, heldout)]
    known = lm.among.together(kept[0] + kept[1], lambda share: ask(lm, share, new_tokens=FEW_TOKENS))
    still = _grouped(known, [len(retain), len(heldout)])
    return Scores(
        forget=forget,
        distracted=distracted,
        paraphrases=_grouped(paraphrases, [len(f.paraphrases) for f in facts]),
        questions=_grouped(questions, [len(f.other_questions) for f in facts]),
        neighbors=_grouped(neighbors, [len(f.neighbors) for f in facts]),
        retain=still[0],
        heldout=still[1],
        perplexity=perplexity(lm, text),
    )


def _grouped(items: Sequence[Answered], sizes: Sequence[int]) -> list[list[Answered]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [list(items[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
