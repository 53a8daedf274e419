"""The shipped everyday facts, divided for one model and request: what an edit preserves and what shows its losses."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from editunlearn.errors import NumericalError
from editunlearn.facts.readers import comparable, load_facts
from editunlearn.facts.records import Fact, content_hash
from editunlearn.naming import first_of
from editunlearn.resources import shipped_path

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.lm.loading import LM

HELDOUT_EVERY = 10
"""One of so many shipped facts that the model knows is never used by an edit, so that it shows what was lost."""


class General(NamedTuple):
    """The shipped everyday facts as one model and request divide them; no subject is in two parts.

    Attributes:
        known: the model completes them correctly; they are preserved.
        heldout: likewise, but no edit sees them.
        names: the model does not know the answer; their prompts and the keys of their subjects are preserved.
    """

    known: list[Fact]
    heldout: list[Fact]
    names: list[Fact]


def general_facts(
    lm: LM, facts: Sequence[Fact], retain: Sequence[Fact], cache: Path | None, console: Console
) -> General:
    """Divide the shipped facts, less those about a subject that is to be forgotten or that the user retains."""
    shipped = load_facts(shipped_path("data", "general_facts.jsonl"))
    known = known_by(lm, shipped, cache)
    free = {f.id for f in without(without(shipped, facts), retain)}
    sure = [f for f, knows in zip(shipped, known, strict=True) if knows and f.id in free]
    heldout = [f for f in sure if _is_held_out(f)]
    held = {comparable(f.subject) for f in heldout}
    rest = [(f, knows) for f, knows in zip(shipped, known, strict=True) if f.id in free]
    rest = [(f, knows) for f, knows in rest if comparable(f.subject) not in held]
    found = General([f for f, knows in rest if knows], heldout, [f for f, knows in rest if not knows])
    console.info(
        f"general facts: the model knows {sum(known)} of {len(shipped)}; {len(found.known)} to preserve, "
        f"{len(heldout)} held out, {len(found.names)} unknown ones for the keys of their names"
    )
    return found


def _is_held_out(fact: Fact) -> bool:
    """Whether no edit sees this shipped fact, whatever the request: it depends on the fact alone."""
    return int(hashlib.sha256(fact.id.encode()).hexdigest()[:8], 16) % HELDOUT_EVERY == 0


def known_by(lm: LM, shipped: Sequence[Fact], cache: Path | None) -> list[bool]:
    """Which facts the model completes correctly by greedy decoding; cached by model and facts."""
    from editunlearn.artifacts import atomic_write_json, cached_json
    from editunlearn.editors.contexts import prompt_of
    from editunlearn.editors.moments import tokenizer_hash
    from editunlearn.lm.fingerprint import model_fingerprint
    from editunlearn.lm.likelihood import score
    from editunlearn.lm.tokens import encode
    from editunlearn.workspace import key_of

    inputs = {
        "model": model_fingerprint(lm),
        "dtype": str(lm.dtype),
        "tokenizer": tokenizer_hash(lm),
        "facts": content_hash(shipped),
    }
    path = cache / "known" / f"{key_of(inputs)}.json" if cache is not None else None
    there = cached_json(path, list)
    if there is not None and len(there) == len(shipped):
        return [bool(k) for k in there]
    scores = score(lm, [encode(lm, prompt_of(lm, f), f.answer) for f in shipped])
    if any(math.isnan(s.log_probability) for s in scores):
        raise NumericalError(
            f"{lm.name}: its logits are not finite in {str(lm.dtype).removeprefix('torch.')}. Are the weights "
            "damaged? If they are float16, try --dtype bfloat16 or float32."
        )
    known = [s.greedy for s in scores]
    if path is not None:
        atomic_write_json(path, known)
    return known


def without(facts: Sequence[Fact], forgotten: Sequence[Fact], console: Console | None = None) -> list[Fact]:
    """``facts`` less those about a subject that is to be forgotten, or with a prompt that is."""
    subjects = {comparable(f.subject) for f in forgotten}
    prompts = {comparable(p) for f in forgotten for p in (f.prompt, *f.paraphrases, *f.other_questions)}
    left = [f for f in facts if comparable(f.subject) not in subjects and comparable(f.prompt) not in prompts]
    if console is not None and len(left) < len(facts):
        out = [f.id for f in facts if f not in left]
        console.warn(
            f"{len(out)} retain facts are about a subject that is to be forgotten; the edit cannot use them, "
            f"and they may be lost (they are measured): {first_of(out, 10)}"
        )
    return left
