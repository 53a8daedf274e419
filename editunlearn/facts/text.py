"""Generic text: the shipped documents, a text file, or a hub dataset, one document at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from editunlearn.errors import InputError
from editunlearn.resources import shipped_path

Part = Literal["statistics", "heldout"]
HELDOUT_EVERY = 10
"""Every tenth shipped document is kept for perplexity and never used for statistics or training."""


def documents(source: str, part: Part = "statistics") -> Iterator[str]:
    """Documents of ``source`` in their order.

    Args:
        source: ``general`` (shipped with the package), a ``.jsonl`` file with a ``text`` field, a plain text file
            (documents are separated by blank lines), or a hub dataset ``id:config:split`` (streamed).
        part: of the shipped text, what is for statistics or what is held out; other sources have no held-out part.

    Raises:
        InputError: no such file, or a line without text.
    """
    if source == "general":
        for i, text in enumerate(_jsonl(shipped_path("data", "general_text.jsonl"))):
            if (i % HELDOUT_EVERY == HELDOUT_EVERY - 1) == (part == "heldout"):
                yield text
    elif Path(source).is_file():
        path = Path(source)
        yield from _jsonl(path) if path.suffix == ".jsonl" else _plain(path)
    elif source.count(":") == 2 and "/" in source.split(":")[0]:
        yield from _hub(source)
    else:
        raise InputError(
            f"moments.text: {source!r} is not a file. Give 'general' (shipped), a .txt or .jsonl file, "
            "or a hub dataset as id:config:split."
        )


def check_source(source: str) -> None:
    """Raise InputError now if ``source`` cannot be read; hub datasets are only checked for their form."""
    if source in ("general", "none") or (source.count(":") == 2 and "/" in source.split(":")[0]):
        return
    if not sum(bool(text.strip()) for text in documents(source)):  # reads it all: a bad line may be the last
        raise InputError(f"moments.text: {source!r} has no text in it.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); convert it, for example with iconv.") from None


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), 1):  # JSON strings may hold other line separators
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}: not a JSON object with a 'text' field.") from None
        yield str(text)


def _plain(path: Path) -> Iterator[str]:
    for block in _read(path).split("\n\n"):
        if block.strip():
            yield block.strip()


def _hub(source: str) -> Iterator[str]:
    from datasets import load_dataset

    name, config, split = source.split(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the datasets library raises many kinds for "cannot be reached"
        raise InputError(f"moments.text: cannot open the dataset {source!r}: {error}") from error
    for row in rows:
        if "text" not in row:
            raise InputError(f"moments.text: rows of {source!r} have no 'text' field, but {', '.join(sorted(row))}.")
        yield str(row["text"])
