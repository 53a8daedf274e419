"""The folder that ``--out`` names: what is in it, what may be replaced there, how it is made complete."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.general import without

if TYPE_CHECKING:
    import argparse

    from editunlearn.deltas.kinds import Delta
    from editunlearn.editors.earlier import Earlier
    from editunlearn.editors.past import PastKeys
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import MethodHParams

WORK = ".work"
"""Folder in a run directory with the finished stages of an unfinished run."""
DERIVED = ("lora", "merged")
"""Folders in a run directory that are made from its delta."""
TOLD = ("README.md", "report.html", "results.json", "timing.json")
"""Files in it that say something of the delta."""
FILES = ("delta.safetensors", "past_keys.safetensors", *TOLD)
"""All of its files but the manifest, which is written last."""


def check_out(
    out: Path,
    args: argparse.Namespace,
    hp: MethodHParams,
    facts: Sequence[Fact],
    retain: Sequence[Fact],
    past: PastKeys | None,
    earlier: Earlier | None,
) -> None:
    """What is in ``--out`` and is not of this very request is not replaced without being asked.

    Raises:
        InputError: there is the finished run of another request, or something that no run has written.
    """
    from editunlearn.deltas.arithmetic import dtype_name
    from editunlearn.deltas.files import MANIFEST, load_manifest
    from editunlearn.deltas.manifest import fact_set
    from editunlearn.hparams import as_settled, resolved
    from editunlearn.lm.loading import asked_dtype
    from editunlearn.recipes import self_refusals

    ways = "Choose another folder, or give --force."
    if not (out / MANIFEST).is_file():
        own = [] if (out / WORK).is_dir() else [name for name in (*FILES, *DERIVED) if (out / name).exists()]
        if own:
            raise InputError(f"--out {out}: its {', '.join(own)} would be replaced, and no run made them. {ways}")
        return
    try:
        there = load_manifest(out)
    except InputError as error:
        raise InputError([f"--out {out}: {problem} {ways}" for problem in error.problems]) from error
    held = earlier.delta.manifest.facts if earlier is not None else ()
    past = earlier.past if earlier is not None else past
    digest = past.digest() if past is not None else ""
    if earlier is not None:
        facts, again = earlier.divide(facts)
        retain = without(retain, earlier.known(again))
    salt = there.facts[-1].salt if there.facts else None
    asked = fact_set(facts, retain=without(retain, facts), past=digest, salt=salt)
    wanted_sets = [*held, asked]
    same = [part.sha256 for part in there.facts] == [part.sha256 for part in wanted_sets]
    if args.targets == self_refusals.TARGETS:  # the model has not written them yet
        same = [part.ids for part in there.facts] == [part.ids for part in wanted_sets]
        same = same and any(s.startswith(args.targets) for s in there.target_strategy.split("+"))
    settings = (hp.method, as_settled(resolved(hp), there.parts()[-1]))
    if earlier is not None:
        settings = earlier.delta.manifest.settings_with(*settings)
    wanted = asked_dtype(args.dtype)
    dtypes = {site.base_dtype for site in there.sites.values()}
    other = [
        name
        for name, differs in {
            "facts or targets": not same,
            "retain facts or past keys": there.facts[-1:] != () and there.facts[-1].beside not in (asked.beside, None),
            "dtype": wanted is not None and dtypes != {dtype_name(wanted)},
            "model": (there.base.name, there.base.revision) != (args.model, args.revision),
            "method or settings": (there.method, there.hparams) != settings,
        }.items()
        if differs
    ]
    if other:
        raise InputError(f"--out {out}: holds the finished run of another request (other {', '.join(other)}). {ways}")


def make_room(out: Path, delta: Delta) -> None:
    """Remove what an earlier run made of another delta, its manifest first: what has none is not complete."""
    from editunlearn.deltas.files import MANIFEST

    if _holds_another(out, delta):
        _remove(out, (MANIFEST, *FILES))


def remove_derived(out: Path, delta: Delta) -> None:
    """Remove what is there of another delta beside that delta itself, which can then be replaced in one step."""
    if _holds_another(out, delta):
        _remove(out, TOLD)


def _holds_another(out: Path, delta: Delta) -> bool:
    from editunlearn.deltas.files import MANIFEST, load_manifest

    if not (out / MANIFEST).is_file():
        return False
    try:
        there = load_manifest(out)
    except InputError:
        return True
    return there.with_sites(there.sites) != delta.manifest


def _remove(out: Path, files: Sequence[str]) -> None:
    for name in files:
        (out / name).unlink(missing_ok=True)
    for name in DERIVED:
        shutil.rmtree(out / name, ignore_errors=True)


def finish(out: Path, delta: Delta, past: PastKeys, facts: Sequence[Fact] | None) -> None:
    """Save past keys and the delta, the last of a run's files; remove its stages and what killed runs left unfinished.

    Args:
        facts: their text is kept in the manifest.
    """
    from editunlearn.editors.earlier import Earlier

    Earlier(delta, past).save(out, facts)
    for path in (out / WORK, *out.glob(".*.tmp-*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
