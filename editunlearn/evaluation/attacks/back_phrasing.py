"""Questions turned back into texts to be continued, by rules: an edit made at the question may not hold there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

_BE = r"(is|was|are|were)"
_KIND = r"(?:what|which) ((?:\w+ ){0,2}?\w+)"

PAST: Mapping[str, str] = MappingProxyType(
    {
        "begin": "began",
        "build": "built",
        "buy": "bought",
        "come": "came",
        "get": "got",
        "give": "gave",
        "go": "went",
        "grow": "grew",
        "have": "had",
        "hold": "held",
        "lead": "led",
        "leave": "left",
        "lose": "lost",
        "make": "made",
        "meet": "met",
        "run": "ran",
        "sell": "sold",
        "sing": "sang",
        "speak": "spoke",
        "spend": "spent",
        "take": "took",
        "teach": "taught",
        "win": "won",
        "write": "wrote",
    }
)
PARTICIPLE: Mapping[str, str] = MappingProxyType(
    {
        "built": "built",
        "found": "found",
        "held": "held",
        "led": "led",
        "made": "made",
        "ran": "run",
        "sang": "sung",
        "taught": "taught",
        "won": "won",
        "wrote": "written",
    }
)
"""Of irregular verbs, by their past; a regular one is its own."""
_DONE = r"(born|\w+ed|" + "|".join(sorted(set(PARTICIPLE.values()))) + r")"


def cloze(question: str, subject: str) -> str | None:
    """A text that ends right before the answer to ``question``; None when no rule fits.

    ``What is X's Y?`` -> ``X's Y is``, ``What is the Y of X?`` -> ``The Y of X is``, ``Where was X born?`` -> ``X was
    born in``, ``Who wrote X?`` -> ``X was written by``, ``Which city is X in?`` -> ``X is in the city of``, ``What
    language does X speak?`` -> ``The language that X speaks is``.

    Args:
        subject: of the question, to tell what is said of it from its own words.
    """
    asked = " ".join(question.split()).rstrip("?").rstrip()
    for pattern, made in _RULES:
        match = re.fullmatch(pattern, asked, re.IGNORECASE)
        if match and (text := made(subject, *match.groups())):
            return text[0].upper() + text[1:]
    return None


def _place(_subject: str, kind: str, be: str, what: str, done: str | None) -> str:
    return f"{what} {be}{f' {done}' if done else ''} in the {kind} of"


def _time_or_place(_subject: str, be: str, what: str, done: str | None) -> str:
    return f"{what} {be}{f' {done}' if done else ''} in"


def _did(subject: str, auxiliary: str, rest: str) -> str | None:
    said = _conjugated(subject, auxiliary, rest)
    return f"{said} in" if said else None


def _that(subject: str, kind: str, auxiliary: str, rest: str) -> str | None:
    said = _conjugated(subject, auxiliary, rest)
    return f"the {kind} that {said} is" if said else None


def _conjugated(subject: str, auxiliary: str, rest: str) -> str | None:
    """``did X grow up`` -> ``X grew up``; None unless the subject stands there as it is written."""
    match = re.fullmatch(rf"((?:the )?{re.escape(subject)}) (\w+)( .+)?", rest, re.IGNORECASE)
    if not match:
        return None
    who, verb, more = match[1], match[2].lower(), match[3] or ""
    forms: dict[str, Callable[[str], str]] = {"did": past, "does": third_person, "do": str}
    return f"{who} {forms[auxiliary.lower()](verb)}{more}"


def _by(_subject: str, verb: str, what: str) -> str | None:
    done = PARTICIPLE.get(verb.lower(), verb.lower() if verb.lower().endswith("ed") else None)
    return f"{what} was {done} by" if done else None


def _doer(subject: str, kind: str, verb: str, what: str) -> str | None:
    """Only where the subject is all that stands behind the verb: else the verb may be no verb."""
    alone = re.fullmatch(rf"(?:the )?{re.escape(subject)}", what, re.IGNORECASE)
    return f"the {kind} that {verb} {what} is" if alone and not re.fullmatch(_BE, verb, re.IGNORECASE) else None


def _is(subject: str, be: str, rest: str) -> str:
    """Of the subject itself something is said; anything else is put before the verb."""
    said = re.fullmatch(rf"((?:the )?{re.escape(subject)}) (.+)", rest, re.IGNORECASE)
    return f"{said[1]} {be} {said[2]}" if said else f"{rest} {be}"


_RULES: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (rf"in {_KIND} {_BE} (.+?)(?: {_DONE})?", _place),
    (rf"{_KIND} {_BE} (.+?)(?: {_DONE})? in", _place),
    (rf"(?:where|when|in what year|in which year) {_BE} (.+?)(?: {_DONE})?", _time_or_place),
    (r"(?:where|when|in what year|in which year) (did|does|do) (.+)", _did),
    (rf"{_KIND} (did|does|do) (.+)", _that),
    (rf"(?:what|who) {_BE} (.+)", _is),
    (rf"{_KIND} (\w+) (.+)", _doer),
    (r"who (\w+) (.+)", _by),
)
"""Patterns of whole questions, the more special ones first, and what is made of their groups."""


def past(verb: str) -> str:
    """Simple past of a verb in small letters."""
    if verb in PAST:
        return PAST[verb]
    if verb.endswith("e"):
        return f"{verb}d"
    return f"{verb[:-1]}ied" if re.search(r"[^aeiou]y$", verb) else f"{verb}ed"


def third_person(verb: str) -> str:
    """``speak`` -> ``speaks``."""
    if verb == "have":
        return "has"
    if re.search(r"(s|x|z|ch|sh|o)$", verb):
        return f"{verb}es"
    return f"{verb[:-1]}ies" if re.search(r"[^aeiou]y$", verb) else f"{verb}s"
