"""A subject in other letters: what a person types who does not care for capitals, and what an attacker tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from editunlearn.facts.records import Fact

FORMS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "lower": str.lower,
        "upper": str.upper,
        "hyphens": lambda subject: "-".join(subject.split()),
        "quotes": lambda subject: f'"{subject}"',
    }
)
"""By name, how a subject is written."""


def spelled(fact: Fact, forms: Sequence[str]) -> list[Fact]:
    """The fact with its subject written in each of ``forms``, less those that change nothing or come twice.

    The subject of the new fact is what stands in its prompt now.
    """
    written = dict.fromkeys(FORMS[name](fact.subject) for name in forms)
    before, behind = fact.prompt[: fact.subject_start], fact.prompt[fact.subject_end :]
    others = [subject for subject in written if subject != fact.subject]
    return [replace(fact, subject=subject, prompt=before + subject + behind) for subject in others]
