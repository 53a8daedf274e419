"""Names in messages: near ones, and the first of many; one wording everywhere."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that ``word`` most likely meant, ignoring case and ``-`` or ``_``; None if none is near."""
    folded = {option.lower().replace("-", "_"): option for option in options}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading space, or an empty string when nothing is near."""
    near = nearest(word, options)
    return f" Did you mean {near!r}?" if near is not None else ""


def first_of(names: Sequence[str], most: int) -> str:
    """``a, b and 3 more``: at most so many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
