"""Second moments on disk: measured once per model, site and text, resumed when interrupted."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.editors.statistics import add_windows
from editunlearn.errors import InputError, NumericalError
from editunlearn.facts.text import documents
from editunlearn.lm.batching import by_length, chunks
from editunlearn.lm.fingerprint import model_fingerprint
from editunlearn.lm.weights import device_of, shape
from editunlearn.lm.windows import windows
from editunlearn.numerics import solve
from editunlearn.numerics.moments import SecondMoment
from editunlearn.workspace import Workspace

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.hparams import Moments
    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM
    from editunlearn.lm.processes import Processes

WINDOWS = 8
"""Whole windows in one forward pass; of shorter ones more."""
SORTED = 512
"""Windows that are sorted by length among themselves: short documents cost hardly any padding, and reading stays in
order by and large."""
WORK_PER_SAVING = 20.0
"""Time from one checkpoint of an unfinished measurement to the next, as a multiple of the time that writing it takes:
the sums of a large model take seconds, those of a small one next to nothing."""


def tokenizer_hash(lm: LM) -> str:
    """Hash of what the tokenizer does with a text of many kinds of characters, its size, and how it is used to chat."""
    probe = "The café's 3rd menu: naïve, 数学, Ωmega <b>42</b>\n\tdef f(x): return x**2  # end"
    ids = lm.tokenizer(probe)["input_ids"]
    template = getattr(lm.tokenizer, "chat_template", None)
    how = lm.chat.record()  # appended only where it says something, so that hashes made without it stay good
    seen = (list(ids), len(lm.tokenizer), template, *([how] if how else []))
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def pieces(lm: LM, sites: Sequence[Site], hp: Moments) -> list[list[int]]:
    """The text as windows of token ids, as many as the widest of ``sites`` asks for.

    Raises:
        InputError: it has no tokens at all.
    """
    widest = max(shape(lm.model, s.name)[1] for s in sites)
    found = list(windows(lm, documents(hp.text), hp.length, hp.budget(widest)))
    if not found:
        raise InputError(f"moments.text: {hp.text!r} has no text in it.")
    return found


@dataclass(frozen=True)
class SiteMoment:
    """``C`` of one site, and what is derived from it, kept beside it.

    Attributes:
        width: d_in.
        store: where they are kept.
        held: ``C`` where it is not kept there.
    """

    width: int
    store: Workspace
    held: Tensor | None = None

    @property
    def moment(self) -> Tensor:
        """``C`` (d_in, d_in) float32, read anew each time: those of all layers of a large model are gigabytes.

        Raises:
            InputError: it is not there any more.
        """
        if self.held is not None:
            return self.held
        kept = self.store.get("moment")
        if kept is None:
            raise InputError(f"{self.store.folder} was removed while it was needed; run the command again.")
        return kept["moment"]

    def derived(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that depend on ``C`` alone: from the cache, or made and kept."""
        found = self.store.get(name)
        if found is None:
            found = make()
            self.store.put(name, found)
        return found


def get(
    lm: LM,
    sites: Sequence[Site],
    hp: Moments,
    cache: Path | None,
    console: Console,
    *,
    fresh: bool = False,
) -> dict[str, SiteMoment]:
    """``C`` (d_in, d_in) float32 of each site: from the cache where it is there, the rest measured in one pass.

    Processes (``lm.among``) share the text; each gets the whole result, and the first of a machine keeps it.

    Raises:
        InputError: the text has no tokens at all, or a model with ``offload`` and no place to keep them.
        NumericalError: a moment is not finite.
    """
    if lm.offload and cache is None:
        raise InputError("offload keeps second moments on the disk: give a folder for them (cache).")
    windows_of_text, among = pieces(lm, sites, hp), lm.among
    inputs = {
        "model": model_fingerprint(lm),
        "dtype": str(lm.dtype),
        "tokenizer": tokenizer_hash(lm),
        "windows": hashlib.sha256(repr(windows_of_text).encode()).hexdigest(),
    }
    share = {"share": [among.rank, among.world]} if among.world > 1 else {}
    stores = {s.name: Workspace(_root(cache), {**inputs, "site": s.name}, fresh=fresh) for s in sites}
    widths = {s.name: shape(lm.model, s.name)[1] for s in sites}
    found = {name: SiteMoment(widths[name], store) for name, store in stores.items() if store.holds("moment")}
    lacking = among.union([s.name for s in sites if s.name not in found])  # processes may have caches of their own
    missing = [s for s in sites if s.name in lacking]

    def unfinished(some: Sequence[Site]) -> Workspace:
        return Workspace(_root(cache), {**inputs, **share, "sites": [s.name for s in some]}, fresh=fresh)

    def clear() -> None:
        for some in (sites, *([site] for site in sites)):
            unfinished(some).remove()

    if not missing:
        clear()  # a run that was killed behind the last of them has left it
        console.info(f"second moments: {len(sites)} from the cache, {sum(map(len, windows_of_text)):,} tokens each")
        return found
    # the sums of all layers in one pass, or those of one layer at a time
    passes = [([s], unfinished([s])) for s in missing] if lm.offload else [(missing, unfinished(sites))]
    for some, partial in passes:
        for name, moment in _measure(lm, some, windows_of_text, partial, console, among):
            if not torch.isfinite(moment).all():
                partial.remove()
                raise NumericalError(f"{lm.name}: the second moment of {name} is not finite; nothing more was kept.")
            kept = among.local_rank == 0 and stores[name].folder is not None
            if kept:
                stores[name].put("moment", {"moment": moment})
            found[name] = SiteMoment(widths[name], stores[name], None if kept or lm.offload else moment)
            del moment  # or it would be there while the next one is made
    clear()
    if lm.offload:
        among.each(lambda: None)  # the first of each machine has kept them now
    return {s.name: found[s.name] for s in sites}


def _root(cache: Path | None) -> Path | None:
    return cache / "moments" if cache is not None else None


def _measure(
    lm: LM,
    sites: Sequence[Site],
    pieces: list[list[int]],
    partial: Workspace,
    console: Console,
    among: Processes,
) -> Iterator[tuple[str, Tensor]]:
    """Names of sites and their ``C``, the sums of each given up before the next is looked at.

    ``partial`` may hold more sites: a run that was killed while it put the moments had finished some.
    """
    sums: dict[str, SecondMoment] = {}
    batches = among.share(_batches(pieces))
    done, saved, writing = 0, time.monotonic(), 0.0
    kept = partial.get("partial")
    if kept is not None and all(site.name in kept for site in sites):
        done = int(kept["batches"])
        for site in sites:
            sums[site.name] = SecondMoment(len(kept[site.name]))
            sums[site.name].total, sums[site.name].count = kept[site.name], int(kept["tokens"])
        console.info(f"second moments: going on after {int(kept['tokens']):,} tokens")
    with console.progress(sum(len(p) for b in batches[done:] for p in b), "second moments (tokens)") as bar:
        for number, part in enumerate(batches[done:], done + 1):
            bar.update(add_windows(lm, sites, sums, part, console.warn))
            began = time.monotonic()
            if began - saved >= WORK_PER_SAVING * writing and number < len(batches):
                state = {name: running.total for name, running in sums.items()}
                counts = {"batches": torch.tensor(number), "tokens": torch.tensor(sums[sites[0].name].count)}
                partial.put("partial", {**state, **counts})
                saved = time.monotonic()
                writing = saved - began
    for site in sites:
        yield site.name, _of_all(lm, site, sums.pop(site.name, None), among)


def _of_all(lm: LM, site: Site, own: SecondMoment | None, among: Processes) -> Tensor:
    """``C`` of what all processes have seen, each of which may have had nothing to add; float32 on the CPU."""
    device = device_of(lm.layout.module(lm.model, site.name))
    whole = own or SecondMoment(shape(lm.model, site.name)[1], device)
    whole.total = among.add(whole.total.to(device))
    whole.count = int(among.add(torch.tensor(whole.count, device=device)))
    return whole.mean(torch.float32).cpu()


def _batches(pieces: Sequence[list[int]]) -> list[list[list[int]]]:
    longest = max(map(len, pieces))
    found = []
    for near in chunks(pieces, SORTED):
        found += [[near[i] for i in part] for part in by_length([len(p) for p in near], WINDOWS * longest)]
    return found


def change_of_solve(half: Tensor, whole: Tensor, keys: Tensor, weight: float) -> float:
    """How far the recognisers of ``keys`` (n, d) with one moment are from those with another, relative (Frobenius)."""
    one, other = (
        solve.recognisers(keys, solve.factor(solve.preservation(moment, weight)), 1.0) for moment in (half, whole)
    )
    return float((one - other).norm() / other.norm())


def warn_if_few(moments: dict[str, SiteMoment], tokens: int, warn: Callable[[str], None]) -> None:
    """Say so when there are fewer tokens than dimensions: such a moment is singular, it preserves only what it saw."""
    widest = max(m.width for m in moments.values())
    if tokens < widest:
        warn(
            f"the second moment is of {tokens:,} tokens, fewer than its width {widest:,}, and preserves only what it "
            f"saw; about {10 * widest:,} give a steady estimate (moments.tokens, moments.text)"
        )
