"""Benchmarks: what is asked (parts, made of probes), and what is made of the answers (totals). One file for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from editunlearn.errors import InputError
from editunlearn.evaluation import judging
from editunlearn.evaluation.probes import Decoding, Look, Probe
from editunlearn.evaluation.results import Item
from editunlearn.facts.sources import read_rows
from editunlearn.naming import did_you_mean

if TYPE_CHECKING:
    from editunlearn.evaluation.results import Measured, Value
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "facts": (),
        "tofu": ("forget01", "forget05", "forget10"),
        "rwku": (),
        "muse": ("news", "books"),
        "knowundo": ("copyright", "privacy"),
        "wmdp": ("bio", "chem", "cyber"),
        "safepku": (),
        "counterfact": (),
        "zsre": (),
        "edu-relat": (),
        "lm-eval": (),
    }
)
"""By name, what may stand behind its colon; none: anything or nothing, as its file says."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the data of a suite come from.

    Attributes:
        data_root: folder with local copies of hub datasets; None: the hub.
        limit: of each part's items, the first so many; None: all.
        facts, retain: of ``--facts`` and ``--retain``.
        notes: what could not be read and is left out.
    """

    data_root: Path | None = None
    limit: int | None = None
    facts: Sequence[Fact] = ()
    retain: Sequence[Fact] = ()
    notes: list[str] = field(default_factory=list)

    def rows(
        self, place: str, columns: Iterable[str], *, where: Callable[[Record], bool] = lambda _: True
    ) -> list[Record]:
        """Records of ``OWNER/NAME:CONFIG[:SPLIT]`` or a file, as many as the limit allows.

        Args:
            columns: each record must have them.
            where: only these records.

        Raises:
            InputError: there is no such place, a column is missing, or no record is left.
        """
        read = read_rows(place, data_root=self.data_root, split="test")
        if read.problems:
            raise InputError(read.problems)
        self.notes.extend(read.notes if place.count(":") > 1 else ())  # a split that was named, and is not there
        records: list[Record] = [row.data for row in read.rows]
        columns = tuple(columns)
        for column in columns:
            missing = [row.where for row in read.rows if row.data.get(column) is None]
            if missing:
                there = ", ".join(sorted(map(str, records[0])))
                raise InputError(f"{missing[0]}: no column {column!r}, which this suite reads. There: {there}.")
        full = [r for r in records if all(not isinstance(r[c], str) or r[c].strip() for c in columns)]
        if len(full) < len(records):
            self.notes.append(f"{place}: {len(records) - len(full)} records with an empty field are left out.")
        kept = [record for record in full if where(record)]
        if not kept:
            raise InputError(f"{place}: none of its {len(records)} records can be asked.")
        return kept[: self.limit]

    @property
    def whole(self) -> Source:
        """The same place without a limit."""
        return replace(self, limit=None)

    def optional(
        self, place: str, columns: Iterable[str], *, where: Callable[[Record], bool] = lambda _: True
    ) -> list[Record]:
        """Like :meth:`rows`; nothing, and a note, where there is no such data."""
        try:
            found = self.rows(place, columns, where=where)
        except InputError as error:
            self.notes.append(f"left out: {error}")
            return []
        return found


@dataclass
class Part:
    """What is measured in one go, and kept when a run is interrupted.

    Attributes:
        name: of the part, the first half of its metrics' names.
        probes: what is asked.
        metrics: names of :data:`editunlearn.evaluation.judging.METRICS`.
        decoding: how answers are decoded.
    """

    name: str
    probes: Sequence[Probe]
    metrics: tuple[str, ...]
    decoding: Decoding = field(default_factory=Decoding)

    @property
    def looks(self) -> int:
        """The sum of what :meth:`items` reports."""
        return Look(judging.needs(self.metrics)).work(self.probes)

    @property
    def looks_before(self) -> int:
        """The sum of what :meth:`prepare` reports."""
        return 0

    @property
    def divisible(self) -> bool:
        """Whether an item comes out the same whichever others are looked at with it (samples depend on their batch)."""
        return type(self).items is Part.items and not self.decoding.top_k

    def prepare(self, lm: LM, progress: Callable[[int], None]) -> None:
        """Look at the model before anything is applied to it."""

    def items(self, lm: LM, progress: Callable[[int], None]) -> list[Item]:
        """What comes of each probe with the model as it computes now."""
        seen = Look(judging.needs(self.metrics), self.decoding, progress).at(lm, self.probes)
        return [
            Item(s.probe.shown, s.probe.answer, s.text, s.probe.group, judging.judge(s, self.metrics)) for s in seen
        ]


class Module(Protocol):
    """What the file of a suite defines."""

    def read(self, which: str, source: Source) -> Any:
        """The data, checked; needs no model."""

    def parts(self, lm: LM, data: Any) -> list[Part]:
        """What is asked of this model."""

    def totals(self, measured: Measured, reference: Measured | None) -> dict[str, Value]:
        """Numbers made of several parts, or of a part and a reference."""


def is_facts(name: str) -> bool:
    """Whether this suite is about the facts of ``--facts``."""
    return name.partition(":")[0] == "facts"


def module(name: str) -> tuple[Module, str]:
    """The file of ``NAME[:WHICH]`` and what stands behind the colon.

    Raises:
        InputError: no such suite.
    """
    suite, _, which = name.partition(":")
    if suite not in SUITES:
        raise InputError(f"unknown suite {suite!r}.{did_you_mean(suite, SUITES)} Suites: {', '.join(SUITES)}.")
    choices = SUITES[suite]
    if choices and which not in choices:
        raise InputError(f"{name}: choose one of {', '.join(f'{suite}:{choice}' for choice in choices)}.")
    return importlib.import_module(f"editunlearn.evaluation.suites.{suite.replace('-', '_')}"), which
