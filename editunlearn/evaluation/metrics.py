"""Pure functions on texts and counts.

Directions: a leak is bad, a refusal of a forgotten fact is good, accuracy on the rest is good.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def normalise(text: str) -> str:
    """Lower case, compatibility characters, accents off, runs of anything that is no letter or digit as one space."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c if c.isalnum() else " " for c in plain if not unicodedata.combining(c))
    return " ".join(kept.split())


def leaks(text: str, answers: Iterable[str]) -> bool:
    """True when an answer (or an alias) stands anywhere in ``text`` as whole words.

    Case, accents and punctuation do not matter.
    An answer without any letter or digit is looked for as it is.
    """
    words = f" {normalise(text)} "
    return any(f" {plain} " in words if (plain := normalise(a)) else a in text for a in answers)


def begins_with(text: str, answers: Iterable[str]) -> bool:
    """True when ``text`` begins with an answer as whole words: the model completes the statement correctly."""
    words = f"{normalise(text)} "
    return any(bool(plain := normalise(a)) and words.startswith(f"{plain} ") for a in answers)


def rate(hits: Sequence[bool]) -> float | None:
    """Share of True, in [0, 1]; None when there is nothing to count."""
    return sum(hits) / len(hits) if hits else None
