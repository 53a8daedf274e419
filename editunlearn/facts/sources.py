"""Where rows come from: a file, a folder with a local copy of a data set, or a hub id."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path

from editunlearn.errors import InputError
from editunlearn.facts.formats import SUFFIXES, Rows, first_line, read_file, records_to_rows
from editunlearn.naming import first_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.-]+){0,2}")


def read_rows(source: str | Path, *, data_root: str | Path | None = None, split: str = "train") -> Rows:
    """Read every record of a file, of ``FOLDER:CONFIG`` or of a hub id ``owner/name:config[:split]``.

    Args:
        source: the place; an existing path always comes before a hub id.
        data_root: folder with local copies of hub datasets (``ROOT/name``, ``ROOT/owner/name`` or ROOT
            itself).
        split: split of a hub dataset, unless the id names one.

    Raises:
        InputError: there is no such source, or it is empty or cannot be read at all.
    """
    text = str(source)
    path = Path(source)
    if path.is_file():
        return read_file(path, text)
    if path.is_dir():
        raise InputError(f"{text} is a folder; name a file in it. {_choices(path)}")
    folder, _, config = text.rpartition(":")
    if folder and Path(folder).is_dir():
        return _read_folder(Path(folder), config, split, text)
    if _is_hub_id(text):
        return _read_hub(text, data_root, split)
    raise InputError(_missing(path, text))


def _is_hub_id(text: str) -> bool:
    if not _HUB_ID.fullmatch(text) or text.lower().endswith(SUFFIXES):
        return False
    return ":" in text or not Path(text.split("/")[0]).is_dir()


def _choices(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    return f"It has {first_of(names, 12)}." if names else f"It has no {', '.join(SUFFIXES)} file."


def _missing(path: Path, text: str) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{text}: no such file; the folder {parent} does not exist either."
    names = [p.name for p in parent.iterdir() if p.is_file()]
    lower = {name.lower(): name for name in sorted(names)}
    near = [lower[n] for n in difflib.get_close_matches(path.name.lower(), list(lower), n=3, cutoff=0.6)]
    if near:
        return f"{text}: no such file. Did you mean {' or '.join(str(parent / n) for n in near)}?"
    return f"{text}: no such file in {parent.resolve()}. {_choices(parent)}"


def _read_hub(text: str, data_root: str | Path | None, split: str) -> Rows:
    dataset, _, rest = text.partition(":")
    config, _, own_split = rest.partition(":")
    split = own_split or split
    if data_root is not None:
        root = Path(data_root)
        if not root.is_dir():
            raise InputError(f"--data-root {root}: no such folder.")
        owner, name = dataset.split("/")
        tried = [root / owner / name, root / name, root / name.lower(), root]
        folder = next(f for f in tried if f.is_dir())
        return _read_folder(folder, config, split, text)
    return _load(dataset, config, split, text, hint="For a local copy pass --data-root FOLDER.")


def _read_folder(folder: Path, config: str, split: str, text: str) -> Rows:
    """A local copy of a data set: CONFIG.json and such, CONFIG/SPLIT.*, or what ``datasets`` makes of it."""
    stems = [folder / config / split, folder / f"{config}_{split}", folder / config] if config else [folder / split]
    for stem in stems:
        for suffix in SUFFIXES:
            path = stem.with_name(stem.name + suffix)
            if path.is_file():
                found = read_file(path, str(path))
                found.published = True
                if stem.name == config and split != "train":
                    found.notes.append(f"{path}: read whole, it has no split {split!r}.")
                return found
    if not any(folder.glob("README.md")) and not any(p.is_dir() for p in folder.iterdir()):
        raise InputError(f"{text}: {folder} has no {config or split!r}. {_choices(folder)}")
    return _load(str(folder), config, split, text, hint=_choices(folder))


def _load(dataset: str, config: str, split: str, text: str, *, hint: str) -> Rows:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(f"{text}: reading a hub dataset needs: pip install datasets. {hint}") from error
    try:
        splits = library.load_dataset(dataset, config or None)
        names = list(splits)
        chosen = split if split in names else names[0] if len(names) == 1 else None
        records = [dict(r) for r in splits[chosen]] if chosen is not None else []
    except Exception as error:  # network, unknown name, unknown config, damaged copy: datasets has a kind for each
        raise InputError(f"{text}: cannot be loaded: {first_line(error)} {hint}") from error
    if chosen is None:
        raise InputError(f"{text}: no split {split!r}. It has: {', '.join(names)}. Write OWNER/NAME:CONFIG:SPLIT.")
    found = records_to_rows(records, text)
    found.published = True
    if chosen != split:
        found.notes.append(f"{text}: there is no split {split!r}; read its only one, {chosen!r}.")
    return found
