"""Find what a sentence is about when nobody said so. Deterministic and without a model.

An edit reads its key at the subject's last token, so the end of the span matters more than its start.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from editunlearn.facts.records import Fact

Rule = Literal["answer", "name", "start", "last"]

_REASONS: dict[Rule, str] = {
    "answer": "also in the answer",
    "name": "a name",
    "start": "opens the sentence",
    "last": "last content word",
}


@dataclass(frozen=True, slots=True)
class SubjectSpan:
    """``text[start:end]`` and the rule that found it."""

    start: int
    end: int
    rule: Rule


@dataclass(frozen=True, slots=True)
class _Word:
    start: int
    end: int
    text: str

    @property
    def key(self) -> str:
        return self.text.casefold().replace("’", "'")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_STOP = _set(
    "a an the this that these those there here it its he she they them his her their hers theirs him i me my "
    "we us our you your who whom whose which what when where why how is are was were be been being am do "
    "does did done has have had having can could will would shall should may might must not no nor and or "
    "but if of in on at by to for from with without into onto as than then so such about over under between "
    "among during after before since until while also both each every any some many much more most other "
    "another one ones same very just only own all there's according please tell name list give describe "
    "explain state identify mention say write find according called known"
)
# Words that join two capitalised words into one name.
_JOIN = _set("of the de la le les van von der den di da do dos das du del della el al bin ibn ben y e af av zu & 's")
_TITLES = _set("mr mrs ms dr st ste jr sr prof gen col lt sgt capt rev hon mt ft no vol sen gov rep pres")
_CALENDAR = _set(
    "monday tuesday wednesday thursday friday saturday sunday january february march april may june july "
    "august september october november december"
)
_VERB = re.compile(r"is|are|was|were|has|had|have|can|could|will|would|did|may|might|must|[a-z]{2,}(?:ed|[^isu]s)")

_WORD = re.compile(r"(?:[^\W\d_]\.){2,}(?!\w)|\w+(?:[.'’‐‑-]\w+)*|&")
_POSSESSIVE = re.compile(r"['’]s$", re.IGNORECASE)
_QUOTED = re.compile(
    r'"([^"\n]{1,120})"|“([^”\n]{1,120})”|«([^»\n]{1,120})»|‘([^’\n]{1,120})’'
    r"|(?<!\w)'([^\n]{1,120}?)'(?!\w)"
)
_INITIAL = re.compile(r"(?:\w\.)*\w")
_ENDS = re.compile(r"[.!?:;]")


def find_subject(text: str, answer: str) -> SubjectSpan:
    """Find the subject of a question or cloze prompt.

    The rules, in order; the first that finds something wins:

    1. ``answer``: the name (see 2) in ``text`` that shares the most whole words with the answer, as a whole
       even when the answer has only part of it; in a text without names the longest run of words that is
       also in the answer, stop words at its ends left off.
    2. ``name``: the longest capitalised name or quoted title, the later of two equally long ones. Connecting
       words (of, the, de, van, al-), hyphens, apostrophes and initials belong to it; the first word of a
       sentence, months and weekdays alone do not make one.
    3. ``start``: the word that opens the text, when it owns what follows or when a verb, going by its form,
       or a comma follows ("Water is made of", "Peru's capital", "Lufkin, in the heart of").
    4. ``last``: the last word that is not a stop word, else the last word, else the whole text. Scripts
       other than Latin always end here.

    Returns:
        A span inside ``text``; empty only when the text has nothing but space.
    """
    words = _words(text)
    if words and _is_latin(text):
        names = _names(text, words)
        theirs = [w.key for w in _words(answer)]
        span = _shared_name(names, theirs) if names else _shared_run(words, theirs)
        if span is not None:
            return SubjectSpan(*span, "answer")
        if names:
            best = max(names, key=lambda name: (len(name), name[-1].end - name[0].start, name[0].start))
            return SubjectSpan(best[0].start, best[-1].end, "name")
        if len(words) > 1 and words[0].key not in _STOP and _opens_alone(text, words):
            return SubjectSpan(words[0].start, words[0].end, "start")
    for word in reversed(words):
        if word.key not in _STOP and word.text != "&":
            return SubjectSpan(word.start, word.end, "last")
    if words:
        return SubjectSpan(words[-1].start, words[-1].end, "last")
    start = len(text) - len(text.lstrip())
    return SubjectSpan(start, max(start, len(text.rstrip())), "last")


def has_content(text: str) -> bool:
    """Whether a text has any word that could be a subject, that is, one that is not a stop word."""
    return any(word.key not in _STOP and word.text != "&" for word in _words(text))


def describe(facts: Iterable[Fact]) -> list[str]:
    """One line for each fact whose subject was found and not given: id, subject and why."""
    lines = []
    for fact in facts:
        if fact.subject_found:
            rule = find_subject(fact.prompt, fact.answer).rule
            lines.append(f'{fact.id}: subject "{fact.subject}" ({_REASONS[rule]})')
    return lines


def _words(text: str) -> list[_Word]:
    """Words with hyphens, inner dots and apostrophes kept, a possessive 's left off."""
    words = []
    for match in _WORD.finditer(text):
        word = _POSSESSIVE.sub("", match.group())
        words.append(_Word(match.start(), match.start() + len(word), word))
    return words


def _is_latin(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    latin = sum(c.isascii() or unicodedata.name(c, "").startswith("LATIN") for c in letters)
    return 2 * latin >= len(letters)


def _is_capital(word: _Word) -> bool:
    return any(c.isupper() for c in word.text) and word.text != "I"


def _gap(text: str, left: _Word, right: _Word) -> bool:
    """Whether two words may stand in one name: space between them, or the dot of an initial or a title."""
    between = text[left.end : right.start]
    if between.isspace():
        return True
    dotted = between.startswith(".") and (between == "." or between[1:].isspace())
    return dotted and (_INITIAL.fullmatch(left.text) is not None or left.key in _TITLES)


def _opens_alone(text: str, words: Sequence[_Word]) -> bool:
    between = text[words[0].end : words[1].start]
    return between.lstrip("'’s")[:1] in ("", ",") or between[:1] in "'’" or _VERB.fullmatch(words[1].text) is not None


def _names(text: str, words: Sequence[_Word]) -> list[tuple[_Word, ...]]:
    quoted = list(_titles(text, words))
    inside = {w.start for title in quoted for w in title}
    names = quoted + [n for n in _runs(text, words) if not any(w.start in inside for w in n)]
    return sorted(names, key=lambda name: name[0].start)


def _titles(text: str, words: Sequence[_Word]) -> Iterator[tuple[_Word, ...]]:
    for match in _QUOTED.finditer(text):
        start, end = next(match.span(g) for g in range(1, 6) if match.group(g) is not None)
        title = tuple(w for w in words if start <= w.start and w.end <= end)
        if title:
            # A title of stop words only ("It") is still a title.
            yield title


def _runs(text: str, words: Sequence[_Word]) -> Iterator[tuple[_Word, ...]]:
    position = 0
    while position < len(words):
        run = _run(text, words, position)
        if not run:
            position += 1
            continue
        position += len(run)
        opens = _opens(text, words, words.index(run[0]))
        while run and (run[0].key in _STOP or (run[0].key in _CALENDAR and len(run) == 1)):
            run, opens = run[1:], False
            while run and not _is_capital(run[0]):
                run = run[1:]
        if run and not (opens and len(run) == 1):
            yield tuple(run)


def _run(text: str, words: Sequence[_Word], start: int) -> list[_Word]:
    """The capitalised words from ``start`` on, with joining words between them and numbers after them."""
    if not _is_capital(words[start]):
        return []
    end = start + 1  # of the name so far
    ahead = end
    while ahead < len(words) and ahead - end <= 2 and _gap(text, words[ahead - 1], words[ahead]):
        word = words[ahead]
        owned = text[words[ahead - 1].end] in "'’"
        number = word.text[0].isdigit() and words[ahead - 1].key not in _CALENDAR
        if _is_capital(word) or (ahead == end and (number or word.text == "I")):
            end = ahead + 1
        elif word.key not in _JOIN or owned:
            break
        ahead += 1
    return list(words[start:end])


def _opens(text: str, words: Sequence[_Word], index: int) -> bool:
    """Whether a word is the first of its sentence."""
    if index == 0:
        return True
    between = text[words[index - 1].end : words[index].start]
    return _ENDS.search(between) is not None and not _gap(text, words[index - 1], words[index])


def _shared_name(names: Sequence[Sequence[_Word]], theirs: Sequence[str]) -> tuple[int, int] | None:
    """The name that has the most characters in one run of whole words of the answer; the first of equals."""
    best, score = None, 0
    for name in names:
        common = _common([w.key for w in name], theirs)
        run = name[common[0] : common[1]]
        if all(w.key in _STOP or w.key in _JOIN or len(w.text) == 1 for w in run):
            continue
        length = run[-1].end - run[0].start
        if length > score:
            best, score = name, length
    return None if best is None else (best[0].start, best[-1].end)


def _shared_run(words: Sequence[_Word], theirs: Sequence[str]) -> tuple[int, int] | None:
    """The longest run of words, no stop words at its ends, that the answer has too."""
    best: tuple[int, int] | None = None
    present = set(theirs)
    keys = [w.key for w in words]
    for start, word in enumerate(words):
        if word.key in _STOP or word.key not in present:
            continue
        for stop in range(len(words), start, -1):
            if best is not None and words[stop - 1].end - word.start <= best[1] - best[0]:
                break
            if keys[stop - 1] not in _STOP and _contains(theirs, keys[start:stop]):
                best = (word.start, words[stop - 1].end)
                break
    return best


def _contains(whole: Sequence[str], part: Sequence[str]) -> bool:
    first, size = part[0], len(part)
    return any(w == first and list(whole[i : i + size]) == list(part) for i, w in enumerate(whole))


def _common(ours: Sequence[str], theirs: Sequence[str]) -> tuple[int, int]:
    """Bounds in ``ours`` of its longest run of words that ``theirs`` has; the first of equally long ones."""
    best = (0, 0)
    previous = [0] * (len(theirs) + 1)
    for i, key in enumerate(ours):
        current = [0] * (len(theirs) + 1)
        for j, other in enumerate(theirs):
            if key == other:
                current[j + 1] = previous[j] + 1
                if current[j + 1] > best[1] - best[0]:
                    best = (i + 1 - current[j + 1], i + 1)
        previous = current
    return best
