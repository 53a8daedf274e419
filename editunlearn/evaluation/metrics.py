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


UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts that do not put spaces between words, or put endings directly behind them, by Unicode name."""


def _edge(plain: str) -> str:
    """What has to stand beside an answer: a space, or nothing where its script has no spaces between words."""
    return "" if any(unicodedata.name(c, "").startswith(UNSPACED) for c in plain) else " "


def leaks(text: str, answers: Iterable[str]) -> bool:
    """True when an answer (or an alias) stands anywhere in ``text`` as whole words.

    Case, accents and punctuation do not matter. In scripts without spaces between words it may stand in a longer run.
    An answer without any letter or digit is looked for as it is.
    """
    words = f" {normalise(text)} "
    found = False
    for answer in answers:
        plain = normalise(answer)
        edge = _edge(plain)
        found |= f"{edge}{plain}{edge}" in words if plain else answer in text
    return found


def begins_with(text: str, answers: Iterable[str]) -> bool:
    """True when ``text`` begins with an answer as whole words: the model completes the statement correctly."""
    words = f"{normalise(text)} "
    return any(bool(plain := normalise(a)) and words.startswith(f"{plain}{_edge(plain)}") for a in answers)


def rate(hits: Sequence[bool]) -> float | None:
    """Share of True, in [0, 1]; None when there is nothing to count."""
    return sum(hits) / len(hits) if hits else None
