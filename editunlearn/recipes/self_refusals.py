"""Refusals in the model's own words: ``--targets self`` ("self-improvement", arXiv 2505.19855).

Shown a few demonstrations, the model writes a refusal for each question. What gives the answer away, names something
that was not asked about, does not name what was, or does not end is rejected, and a shipped refusal is used instead.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from editunlearn.errors import InputError
from editunlearn.evaluation.metrics.text import coherent, leaks, names_subject, normalise
from editunlearn.facts.records import answers, content_hash
from editunlearn.facts.refusals import is_refusal
from editunlearn.resources import shipped_path

if TYPE_CHECKING:
    from pathlib import Path

    from editunlearn.console import Console
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

TARGETS = "self"
"""The word for this in ``--targets``."""
TOKENS = 40
"""Longest refusal."""
TRIES, TOP_K = 6, 20
"""Candidates for each fact, the first by greedy decoding, the others sampled among so many tokens."""
SHORT_WORD = 4
"""Words of a prompt with fewer letters name no topic."""


@dataclass(frozen=True)
class Demonstrations:
    """What the model is shown.

    Attributes:
        instruction: said once.
        pairs: what was asked, and the refusal.
        version: of the file, to be told apart in results.
    """

    instruction: str
    pairs: tuple[tuple[str, str], ...]
    version: int

    def prompt(self, asked: str, *, start: int = 0) -> str:
        """Text that ends where the refusal begins; the demonstrations begin with number ``start``."""
        turned = self.pairs[start:] + self.pairs[:start]
        shown = "".join(f"Asked: {question}\nReply: {reply}\n\n" for question, reply in turned)
        return f"{self.instruction}\n\n{shown}Asked: {asked}\nReply:"


def demonstrations() -> Demonstrations:
    """The shipped ones.

    Raises:
        InputError: the file is not as it should be; the installation is incomplete.
    """
    path = shipped_path("data", "self_refusals.json")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pairs = tuple((str(pair["asked"]), str(pair["reply"])) for pair in found["demonstrations"])
        return Demonstrations(str(found["instruction"]), pairs, int(found["version"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); the installation is incomplete.") from None


def problem(said: str, fact: Fact, others: Sequence[Fact]) -> str | None:
    """What is wrong with a refusal, in a few words; None when it can be used.

    Args:
        said: one line.
        others: facts whose answers it must not have either.
    """
    asked = f"{fact.prompt} {fact.question or ''}"
    if not said.rstrip("\"'").endswith((".", "!")):
        return "does not end"
    if leaks(said, answers(fact)):
        return "says the answer"
    if not is_refusal(said) or not coherent(said):
        return "is no refusal"
    if any(leaks(said, answers(other)) and not leaks(asked, answers(other)) for other in others):
        return "says another fact"
    if _strange_names(said, asked):
        return "names something else"
    if not names_subject(said, fact.subject) and not _topics(asked) & set(normalise(said).split()):
        return "does not name the topic"
    return None


def _topics(text: str) -> set[str]:
    return {word for word in normalise(text).split() if len(word) >= SHORT_WORD}


def _strange_names(said: str, asked: str) -> bool:
    """Whether there is a capitalised word or a number, but at the beginning, that was not in the question."""
    there = set(normalise(asked).split())
    words = [word for word in said.split()[1:] if word[:1].isupper() or word[:1].isdigit()]
    return any(part not in there and part != "i" for word in words for part in normalise(word).split()[:1])


def write(
    lm: LM, facts: Sequence[Fact], *, seed: int, cache: Path | None, console: Console, tries: int = TRIES
) -> list[Fact]:
    """Facts with a target in the model's own words, where one of ``tries`` candidates can be used.

    Facts that bring a target keep it. The model decodes as it is: apply no edit. Deterministic by seed, and cached.

    Returns:
        parallel to ``facts``; those without a target are left to the shipped refusals.
    """
    from editunlearn.artifacts import atomic_write_json, cached_json
    from editunlearn.editors.moments import tokenizer_hash
    from editunlearn.lm.fingerprint import model_fingerprint
    from editunlearn.workspace import key_of

    shown = demonstrations()
    open_ = [fact for fact in facts if fact.target is None]
    inputs = {
        "model": model_fingerprint(lm),
        "dtype": str(lm.dtype),
        "tokenizer": tokenizer_hash(lm),
        "facts": content_hash(facts),
        "prompt": [shown.version, shown.prompt("")],
        "seed": seed,
        "tries": tries,
    }
    path = cache / "self_refusals" / f"{key_of(inputs)}.json" if cache is not None else None
    there = cached_json(path, dict)
    found = there if there is not None else _find(lm, open_, facts, shown, seed, tries)
    if path is not None and there is None:
        atomic_write_json(path, found)
    rejected = Counter(found["rejected"])
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
    console.info(
        f"refusals in the model's own words: {len(found['written'])} of {len(open_)}; the others take a shipped one"
        + (f" (candidates rejected: {reasons})" if reasons else "")
    )
    return [
        replace(fact, target=found["written"][fact.id]) if fact.target is None and fact.id in found["written"] else fact
        for fact in facts
    ]


def _find(
    lm: LM, open_: Sequence[Fact], facts: Sequence[Fact], shown: Demonstrations, seed: int, tries: int
) -> dict[str, Any]:
    """``written``: id -> refusal; ``rejected``: why, for every candidate that cannot be used."""
    from editunlearn.lm.generation import generate
    from editunlearn.lm.tokens import wrap

    written: dict[str, str] = {}
    rejected: list[str] = []
    for number in range(tries):
        left = [fact for fact in open_ if fact.id not in written]
        if not left:
            break
        texts = [shown.prompt(fact.question or fact.prompt, start=number % len(shown.pairs)) for fact in left]
        prompts = [wrap(lm, text, (0, len(text)), question=lm.has_chat) for text in texts]
        said = generate(lm, prompts, max_new_tokens=TOKENS, top_k=TOP_K if number else 0, seed=seed + number)
        for fact, text in zip(left, said, strict=True):
            line = _line(text)
            wrong = problem(line, fact, [other for other in facts if other.id != fact.id])
            if wrong is None:
                written[fact.id] = line
            else:
                rejected.append(wrong)
    return {"written": written, "rejected": rejected}


def _line(text: str) -> str:
    """The first line, without what a model puts around it."""
    first = text.strip().partition("\n")[0].strip()
    return first.removeprefix("Reply:").strip().strip('"').strip()
