"""Runs the parts of a suite on a model as it computes now, one after the other; what is measured is kept at once."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.artifacts import atomic_write_json
from editunlearn.errors import InputError, NumericalError
from editunlearn.evaluation import results
from editunlearn.evaluation.results import Item, Measured, Value
from editunlearn.evaluation.suites import Module, Part
from editunlearn.lm.finite import where_not_finite

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.lm.loading import LM


@dataclass(frozen=True)
class Run:
    """One suite on one state of a model.

    Attributes:
        file: where the results go.
        about: what the file says of the run; its ``key`` names everything that the numbers depend on.
        reference: results of a model that never knew and was asked the same, for the metrics that compare.
        fresh: measure again what the file has.
        no_text: keep numbers only.
    """

    file: Path
    about: Mapping[str, Any]
    reference: Measured | None = None
    fresh: bool = False
    no_text: bool = False

    def measure(self, lm: LM, module: Module, parts: Sequence[Part], console: Console) -> dict[str, Any]:
        """Measure the parts that the file does not have yet; what it then holds.

        Raises:
            NumericalError: the model computes numbers that are not finite; what was measured before is kept.
        """
        data = asked(parts)
        how = {part.name: results.asked_hash([[repr(part), self.no_text]]) for part in parts}
        groups = dict.fromkeys(probe.group for part in parts for probe in part.probes if probe.group)
        done, seconds = lm.among.by_first(lambda: self._kept(how))
        missing = [part for part in parts if part.name not in done and part.probes]
        if missing:
            _check_finite(lm, missing[0])
        for part in parts:
            if part.name not in done:
                began = time.monotonic()
                items = measure(lm, part, console, str(self.about["label"]))
                seconds[part.name] = round(time.monotonic() - began, 3)
                done[part.name] = _without_text(items, list(groups)) if self.no_text else items
                lm.among.by_first(lambda: self._save(Measured(done, data), {}, how, seconds, complete=False))
        measured = Measured({part.name: done[part.name] for part in parts}, data)
        totals = module.totals(measured, self.reference)
        return lm.among.by_first(lambda: self._save(measured, totals, how, seconds, complete=True))

    def _kept(self, how: Mapping[str, str]) -> tuple[dict[str, Sequence[Item]], dict[str, float]]:
        """Parts that an earlier run with the same key left, and how long they took."""
        if self.fresh or not self.file.is_file():
            return {}, {}
        try:
            found, measured = results.load(self.file)
        except InputError:
            return {}, {}
        if found.get("key") != self.about["key"]:
            return {}, {}
        kept = {
            name: items for name, items in measured.parts.items() if how.get(name) == found.get("how", {}).get(name)
        }
        return kept, {name: took for name, took in found.get("seconds", {}).items() if name in kept}

    def _save(
        self,
        measured: Measured,
        totals: Mapping[str, Value],
        how: Mapping[str, str],
        seconds: Mapping[str, float],
        *,
        complete: bool,
    ) -> dict[str, Any]:
        own = {name: how[name] for name in measured.parts}
        about = {
            **self.about,
            "complete": complete,
            "how": own,
            "seconds": {k: v for k, v in seconds.items() if k in own},
        }
        found = results.as_json(about, measured, totals)
        atomic_write_json(self.file, found)
        return found


def asked(parts: Sequence[Part]) -> dict[str, str]:
    """By part, a hash of what is asked; results can be compared where it is equal."""
    return {
        part.name: results.asked_hash([(p.shown, p.answer, p.paraphrased, p.wrong) for p in part.probes])
        for part in parts
    }


def _without_text(items: Sequence[Item], groups: Sequence[str]) -> list[Item]:
    """The numbers alone; the id of a fact, its group, becomes its number, the same in all parts."""
    number = {group: str(i) for i, group in enumerate(groups)}
    return [replace(item, shown="", expected="", said=None, group=number.get(item.group, "")) for item in items]


def _check_finite(lm: LM, part: Part) -> None:
    """A model whose logits are not numbers says nothing, which would look like forgetting."""
    probe = part.probes[0]
    text = probe.prompt.text if probe.prompt is not None else probe.answer
    place = where_not_finite(lm, text) if text else None
    if place:
        raise NumericalError(f"{lm.name}: numbers that are not finite come out of {place}. Try --dtype float32.")


def measure(lm: LM, part: Part, console: Console, label: str = "") -> list[Item]:
    """One part, its items shared by the processes of ``lm.among`` where that changes nothing.

    Raises:
        NumericalError: a value is not finite; the message names the layer where that begins.
    """
    with console.progress(part.looks, f"{label} {part.name}".strip()) as bar:
        if part.divisible:
            items: list[Item] = lm.among.together(
                part.probes, lambda share: replace(part, probes=list(share)).items(lm, bar.update)
            )
        else:
            items = lm.among.by_first(lambda: part.items(lm, bar.update))
    for number, item in enumerate(items):
        bad = [name for name, value in item.values.items() if not math.isfinite(value)]
        if bad:
            place = where_not_finite(lm, item.shown or item.expected)
            raise NumericalError(
                f"{part.name}: {', '.join(bad)} of item {number} is not finite; "
                + (f"the first numbers that are not come out of {place}." if place else "the weights seem fine.")
                + " Try --dtype float32."
            )
    return items
