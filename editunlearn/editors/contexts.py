"""Rows of token ids for the facts of a request: each fact in each context, with and without its target."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editunlearn.editors import made_up
from editunlearn.editors.moments import tokenizer_hash
from editunlearn.editors.value_types import Problem
from editunlearn.errors import InputError
from editunlearn.facts.spellings import spelled
from editunlearn.lm.fingerprint import model_fingerprint
from editunlearn.lm.generation import context_prefixes
from editunlearn.lm.tokens import Prompt, Row, encode, wrap

if TYPE_CHECKING:
    from pathlib import Path

    from editunlearn.facts.records import Fact
    from editunlearn.hparams import ContextPrefixes, EditorHParams, Located, Valued
    from editunlearn.lm.loading import LM

MADE_UP = 4000
"""Names made of the vocabulary, beside those of the shipped facts."""

SWAPS = 24
"""Other subjects that each forgotten fact's prompt is kept for."""

STRANGERS = 1500
"""Prompts of facts to keep that are kept for another subject as well."""

UNSEEN = 4
"""Context prefixes that nothing is trained on."""

PINNED = 3
"""Prompts per fact on which its value keeps the next-token distribution, when ``value.kl`` is not 0."""


def prompt_of(lm: LM, fact: Fact, prefix: str = "") -> Prompt:
    """The fact's prompt in the model's own format, behind ``prefix``."""
    span = (fact.subject_start, fact.subject_start + len(fact.subject))
    return wrap(lm, fact.prompt, span, question=fact.is_question, prefix=prefix)


def prefixes(lm: LM, hp: ContextPrefixes, cache: Path | None) -> list[str]:
    """The model's own context prefixes, cached by everything they depend on."""
    from editunlearn.artifacts import atomic_write_json, cached_json
    from editunlearn.workspace import key_of

    if hp.count == 0:
        return []
    inputs = {
        **hp.model_dump(),
        "model": model_fingerprint(lm),
        "dtype": str(lm.dtype),
        "tokenizer": tokenizer_hash(lm),
    }
    path = cache / "prefixes" / f"{key_of(inputs)}.json" if cache is not None else None
    there = cached_json(path, list)
    if there is not None and len(there) == hp.count:
        return [str(p) for p in there]
    made = context_prefixes(lm, hp.count, hp.tokens, hp.seed)
    if path is not None:
        atomic_write_json(path, made)
    return made


@dataclass(frozen=True)
class ForgetRows:
    """Every fact in every context, the bare prompt first; only the target at the end tells ``targets`` from ``keys``.

    A fact whose subject is also written in other letters is there once for each way.

    Attributes:
        keys: fact-major list of rows without target, facts * contexts of them.
        targets: for each fact its rows with the target.
        owner: of each of ``targets`` the number of its fact; all facts as they are come before any in other letters.
    """

    keys: list[Row]
    targets: list[list[Row]]
    owner: tuple[int, ...]

    def by_fact(self) -> list[list[Row]]:
        """For each fact its rows with the target, in all spellings."""
        found: dict[int, list[Row]] = {}
        for number, rows in zip(self.owner, self.targets, strict=True):
            found.setdefault(number, []).extend(rows)
        return list(found.values())


def forget_rows(
    lm: LM, facts: Sequence[Fact], texts: Sequence[str], hp: Located, spellings: Sequence[str] = ()
) -> ForgetRows:
    """Rows of the facts to forget.

    Args:
        spellings: names of :data:`~editunlearn.facts.spellings.FORMS` that subjects are written in as well.

    Raises:
        InputError: a fact has no target yet.
    """
    missing = [f.id for f in facts if f.target is None]
    if missing:
        raise InputError(
            f"{len(missing)} facts have no target (first: {missing[0]!r}). "
            "Fill them with fill_targets(facts, 'refusal')."
        )
    keys, targets = [], []
    others = [(number, other) for number, fact in enumerate(facts) for other in spelled(fact, spellings)]
    numbered = [*enumerate(facts), *others]
    for _, fact in numbered:
        prompts = [prompt_of(lm, fact, prefix) for prefix in ("", *texts)]
        with_target = [encode(lm, p, fact.target, hp.subject_token) for p in prompts]
        keys += [prompt_alone(row) for row in with_target]
        targets.append(with_target)
    return ForgetRows(keys, targets, tuple(number for number, _ in numbered))


def unseen_rows(lm: LM, facts: Sequence[Fact], hp: EditorHParams, cache: Path | None) -> list[list[Row]]:
    """For each fact its rows with the target behind prefixes of another seed; bare if there are no prefixes.

    In other letters it comes behind one of them.
    """
    own = hp.context_prefixes
    other = own.model_copy(update={"count": UNSEEN if own.count else 0, "seed": own.seed + 1})
    texts = prefixes(lm, other, cache)
    plain = [of_fact[1 if texts else 0 :] for of_fact in forget_rows(lm, facts, texts, hp).targets]
    spelt = forget_rows(lm, facts, texts[:1], hp, hp.spellings)
    for number, rows in list(zip(spelt.owner, spelt.targets, strict=True))[len(facts) :]:
        plain[number].append(rows[-1])
    return plain


def keep_rows(lm: LM, facts: Sequence[Fact], hp: Located, *, answers: bool) -> list[Row]:
    """Rows of facts to keep: the bare prompt, with the true answer behind it if ``answers``."""
    return [encode(lm, prompt_of(lm, f), f.answer if answers else None, hp.subject_token) for f in facts]


def earlier_rows(lm: LM, facts: Sequence[Fact], hp: Located, *, targets: bool) -> list[Row]:
    """Rows of facts that earlier edits wrote: the bare prompt, with what is now said behind it if ``targets``."""
    said = [replace(fact, answer=fact.target) for fact in facts if fact.target is not None]
    return keep_rows(lm, said, hp, answers=targets)


def other_names(lm: LM, facts: Sequence[Fact], others: Sequence[Fact], hp: Located) -> list[str]:
    """Names that are not to be forgotten, shuffled: the subjects of ``others``, and ``MADE_UP`` more."""
    draw = random.Random(hp.seed)
    forgotten = {word for f in facts for word in f.subject.split()}  # a name that ends like one would work against it
    words = [word for word in made_up.capitalised_words(lm) if word not in forgotten]
    made = {made_up.name(words, draw) for _ in range(MADE_UP)} if words else set()
    found = sorted(({f.subject for f in others} | made) - {f.subject for f in facts})
    draw.shuffle(found)
    return found


def swapped_rows(lm: LM, facts: Sequence[Fact], subjects: Sequence[str], count: int, hp: Located) -> list[Row]:
    """At most ``count`` prompts of ``facts`` about ``subjects`` instead of their own, scored at the last token.

    What is forgotten about one subject must not be lost for all: prompts of forgotten facts share every word with them
    but the name.
    """
    rows = []
    for number in range(min(count, len(facts) * len(subjects))):
        fact = facts[number % len(facts)]
        # one name further after every round, or the same few facts and names would meet again and again
        subject = subjects[(number + number // len(subjects)) % len(subjects)]
        text, start = _swapped(fact, subject)
        prompt = wrap(lm, text, (start, start + len(subject)), question=fact.is_question)
        rows.append(scored_at_the_end(encode(lm, prompt, None, hp.subject_token)))
    return rows


def scored_at_the_end(row: Row) -> Row:
    """A prompt of which the last position is scored: any token behind it will do."""
    return replace(row, ids=(*row.ids, row.ids[-1]))


def prompt_alone(row: Row) -> Row:
    """A row without what stands behind its prompt."""
    return replace(row, ids=row.ids[: row.prompt_length])


def problems(
    lm: LM,
    facts: Sequence[Fact],
    rows: ForgetRows,
    keep: Sequence[Fact],
    hp: Valued,
    owner: Sequence[int] | None = None,
) -> list[Problem]:
    """What each value is optimised on; with ``value.kl`` also prompts that pin the subject's other continuations.

    ``kl_on: subject`` pins "<subject> is a", as published; ``prompts`` takes prompts of facts to keep and puts the
    fact's subject into them.

    Args:
        owner: of each of ``rows.targets`` the number of its fact; None: they are those of the facts in order.
    """
    found = []
    for number, targets in zip(owner or range(len(facts)), rows.targets, strict=True):
        fact, pinned = facts[number], list[Row]()
        if hp.value.kl > 0:
            texts = [_swapped(k, fact.subject) for k in _nth(keep, number)] if hp.value.kl_on == "prompts" else []
            for text, start in texts or [(f"{fact.subject} is a", 0)]:
                prompt = wrap(lm, text, (start, start + len(fact.subject)), question=False)
                pinned.append(encode(lm, prompt, None, hp.subject_token))
        found.append(Problem(tuple(targets[: hp.value.contexts]), tuple(pinned)))
    return found


def _nth(keep: Sequence[Fact], number: int) -> list[Fact]:
    """A few facts to keep, another few for each number."""
    statements = [k for k in keep if not k.is_question]
    return [statements[(number * PINNED + i) % len(statements)] for i in range(min(PINNED, len(statements)))]


def _swapped(fact: Fact, subject: str) -> tuple[str, int]:
    end = fact.subject_start + len(fact.subject)
    return fact.prompt[: fact.subject_start] + subject + fact.prompt[end:], fact.subject_start
