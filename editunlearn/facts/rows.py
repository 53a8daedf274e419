"""From one raw row to one Fact: types, cloze blanks, templates and the subject's place."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from editunlearn.facts.fields import Columns, flatten, known_fields, near_name
from editunlearn.facts.formats import Row
from editunlearn.facts.records import Fact, Neighbor
from editunlearn.facts.subjects import find_subject, has_content
from editunlearn.naming import first_of

_BLANK = re.compile(r"_{3,}")
_MARK = "{}"
_SKIPPED = "skipped, nothing to complete stands before the blank"


@dataclass(slots=True)
class Findings:
    """Problems stop the run; warnings are gathered by kind so that a thousand of one kind are still one
    note."""

    problems: list[tuple[str, str]] = field(default_factory=list)  # (place, what is wrong there)
    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    columns: Columns = field(default_factory=Columns)

    def notes(self, name: str) -> list[str]:
        """One line per kind of warning, with the first three places."""
        lines = self.columns.notes(name)
        for what, places in self.warnings.items():
            lines.append(f"{_listed(places, 3)}: {what}.")
        return lines

    def messages(self) -> list[str]:
        """All problems; those that are the same in more than ten places in one message that names ten of
        them."""
        places: dict[str, list[str]] = defaultdict(list)
        for where, what in self.problems:
            places[what].append(where)
        messages = []
        for where, what in self.problems:
            if len(places[what]) <= 10:
                messages.append(f"{where}: {what}.")
            elif where == places[what][0]:
                messages.append(f"{_listed(places[what], 10)}: {what}.")
        return messages


def _listed(places: list[str], count: int) -> str:
    """Places joined, the file they share written only once: ``facts.jsonl:3, :8 and 2 more``."""
    first = places[0]
    file = first[: first.rfind(":")] if ":" in first else ""
    return first_of([first, *(place.removeprefix(file) for place in places[1:])], count)


class _Bad(Exception):
    """This row is not a fact; the reason is complete but for its place."""


def to_fact(row: Row, findings: Findings) -> Fact | None:
    """Check one row. Returns None when it is a problem or is skipped; ``findings`` says which and why."""
    values = flatten(row.data, findings.columns)
    reasons: list[str] = []
    if not row.data:
        reasons.append("an empty object")
        values = {}
    texts = {name: _text(values, name, reasons) for name in _TEXTS if name in values}
    several = values.get("answer")
    lists: dict[str, list[str]] = {
        name: _texts(values, name, reasons) for name in ("paraphrases", "aliases") if name in values
    }
    neighbors = _neighbors(values.get("neighbors"), reasons)
    if isinstance(several, list):
        texts["answer"], extra = _first_answer(several, reasons)
        lists["aliases"] = [*lists.get("aliases", []), *extra]
    if row.data and "answer" not in texts:
        reasons.append(_absent("answer", row.data))
    if row.data and not {"prompt", "question", "template", "query"} & texts.keys():
        reasons.append(_absent("prompt or question", row.data))
    if not reasons:
        try:
            return _build(row, texts, lists, neighbors, findings)
        except _Bad as bad:
            reasons.append(str(bad))
    findings.problems.extend((row.where, reason) for reason in reasons)
    return None


_TEXTS = (
    "id", "prompt", "answer", "subject", "question", "target", "relation", "template", "query", "neighbor"
)  # fmt: skip


def _absent(what: str, data: Mapping[str, object]) -> str:
    columns = ", ".join(near_name(str(c)) for c in data) or "none"
    return f"no {what}. The row has: {columns}; known fields: {known_fields()}"


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return f"true or false ({str(value).lower()})"
    if isinstance(value, int | float):
        return f'the number {value} (write "{value}")'
    return {"list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)


def _clean(value: str, what: str, reasons: list[str]) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        reasons.append(f"{what} holds half of a surrogate pair, which is not a character")
    return value.strip()


def _text(values: Mapping[str, object], name: str, reasons: list[str]) -> str:
    value = values[name]
    if name in ("id", "relation") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name == "answer" and isinstance(value, list):
        return ""  # several answers, see _first_answer
    if not isinstance(value, str):
        reasons.append(f"{name} has to be text, not {_kind(value)}")
        return ""
    text = _clean(value, name, reasons)
    if not text and name != "target":  # an empty target is a wish: say nothing
        reasons.append(f"{name} is empty" + ("; leave it out instead" if name != "answer" else ""))
    return text


def _texts(values: Mapping[str, object], name: str, reasons: list[str]) -> list[str]:
    value = values[name]
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        reasons.append(f"{name} has to be a list of texts, not {_kind(value)}")
        return []
    texts = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, str):
            reasons.append(f"{name} {number} has to be text, not {_kind(item)}")
        elif not item.strip():
            reasons.append(f"{name} {number} is empty")
        else:
            texts.append(_clean(item, f"{name} {number}", reasons))
    return texts


def _first_answer(values: list[object], reasons: list[str]) -> tuple[str, list[str]]:
    texts = _texts({"answer": values}, "answer", reasons)
    if not values:
        reasons.append("answer is an empty list")
    return (texts[0], texts[1:]) if texts else ("", [])


def _neighbors(value: object, reasons: list[str]) -> tuple[Neighbor, ...]:
    items = [value] if isinstance(value, dict) else [] if value is None else value
    if not isinstance(items, list):
        reasons.append(f'neighbors has to be a list of {{"prompt", "answer"}} objects, not {_kind(value)}')
        return ()
    neighbors = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            reasons.append(f"neighbors {number} has to be an object with prompt and answer, not {_kind(item)}")
            continue
        prompt, answer = (
            item.get("prompt", item.get("question")),
            item.get("answer", item.get("ground_truth")),
        )
        if not (isinstance(prompt, str) and prompt.strip() and isinstance(answer, str) and answer.strip()):
            reasons.append(f"neighbors {number} needs a prompt and an answer, both text and not empty")
        else:
            what = f"neighbors {number}"
            neighbors.append(Neighbor(_clean(prompt, what, reasons), _clean(answer, what, reasons)))
    return tuple(neighbors)


def _build(
    row: Row,
    texts: dict[str, str],
    lists: dict[str, list[str]],
    neighbors: tuple[Neighbor, ...],
    findings: Findings,
) -> Fact | None:
    warn = findings.warnings
    subject = texts.get("subject")
    # RWKU labels a row with the person to forget, who need not be named in it; its neighbor rows name the
    # neighbor.
    is_label = "query" in texts
    if is_label:
        subject = texts.get("neighbor", subject)
    raw = texts.get("prompt") or texts.get("template")
    question = texts.get("question")
    query = texts.get("query")
    if raw is None and query is not None:
        if _BLANK.search(query):
            raw = query
        else:
            question = question or query
    is_question = raw is None
    prompt = _before_blank(raw if raw is not None else question or "")
    if raw is not None and _BLANK.search(raw) and not has_content(prompt):
        warn[_SKIPPED].append(row.where)
        return None
    marked = subject is not None and _MARK in prompt
    if subject is not None and marked:
        if prompt.count(_MARK) > 1:
            raise _Bad(f'prompt "{prompt}" has {prompt.count(_MARK)} {_MARK}; mark the subject\'s place once')
        start = prompt.index(_MARK)
        prompt = _fill(prompt, subject)
    elif subject is not None:
        place = _place(prompt, subject)
        if place is None and not is_label:
            where = "question" if is_question else "prompt"
            raise _Bad(f'subject "{subject}" is not in the {where} "{prompt}"{_hint(prompt, subject)}')
        if place is None:
            warn["the labelled subject is not in the text; another was looked for"].append(row.where)
            subject = None
        else:
            start = place
    found = subject is None
    if subject is None:
        if _MARK in prompt:
            warn[f'"{_MARK}" in a prompt without a subject is read as plain text'].append(row.where)
        span = find_subject(prompt, texts["answer"])
        start, subject = span.start, prompt[span.start : span.end]
    answer = texts["answer"]
    if not is_question and prompt.endswith("?"):
        warn["the prompt is a question; give it as `question` to have it asked as one"].append(row.where)
    if _place(prompt.casefold(), answer.casefold(), whole_words=True) is not None:
        warn["the answer already stands in the prompt"].append(row.where)
    given = texts.get("subject") if not found else None
    return Fact(
        id=texts.get("id") or f"fact-{row.number}",
        prompt=prompt,
        answer=answer,
        subject=subject,
        subject_start=start,
        question=_fill(question, given) if question and given else question,
        target=texts.get("target"),
        paraphrases=tuple(p for p in (_before_blank(_fill(t, given)) for t in lists.get("paraphrases", [])) if p),
        neighbors=neighbors,
        aliases=tuple(a for a in dict.fromkeys(lists.get("aliases", [])) if a != answer),
        relation=texts.get("relation"),
        subject_found=found,
        is_question=is_question,
    )


def _before_blank(text: str) -> str:
    return _BLANK.split(text, maxsplit=1)[0].strip()


def _fill(text: str, subject: str | None) -> str:
    """Put the subject at its mark. Not by str.format, which would choke on any other brace in user text."""
    return text.replace(_MARK, subject, 1) if subject is not None else text


def _place(text: str, words: str, *, whole_words: bool = False) -> int | None:
    """Offset of the last occurrence, preferring one that does not start or end inside a word."""
    last, position = None, text.rfind(words)
    while position >= 0:
        last = position if last is None else last
        end = position + len(words)
        before, after = text[:position][-1:], text[end : end + 1]
        if not (before.isalnum() and words[:1].isalnum()) and not (after.isalnum() and words[-1:].isalnum()):
            return position
        position = text.rfind(words, 0, end - 1)
    return None if whole_words else last


def _folded(text: str) -> tuple[str, list[int]]:
    """Text without case, accents and kinds of dash and apostrophe, and for each character its offset in
    ``text``."""
    out: list[str] = []
    offsets: list[int] = []
    for offset, char in enumerate(text):
        char = " " if unicodedata.category(char) in ("Pd", "Zs") else "'" if char in "‘’ʼ" else char
        for part in unicodedata.normalize("NFKD", char.casefold()):
            if not unicodedata.combining(part):
                out.append(part)
                offsets.append(offset)
    return "".join(out), offsets


def _hint(prompt: str, subject: str) -> str:
    folded, offsets = _folded(prompt)
    wanted = _folded(subject)[0]
    at = folded.find(wanted) if wanted else -1
    if at < 0:
        return ""
    last = offsets[at + len(wanted) - 1] + 1
    while last < len(prompt) and unicodedata.combining(prompt[last]):
        last += 1
    there = prompt[offsets[at] : last]
    what = "case" if there.casefold() == subject.casefold() else "accents, hyphens or apostrophes"
    return f'. It has "{there}", which differs only in {what}; write both the same'
