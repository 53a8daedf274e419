"""Writing files so that a killed run leaves either the old file or the new one, never half of one.

Everything is written to a temporary folder beside its place (a rename is atomic only within one file system)
and renamed when complete. What a killed run leaves there goes when the same place is
written again. No torch here: any room may use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


def _temporary_folder(path: Path) -> Path:
    """A fresh hidden folder beside ``path`` for its unfinished content; what killed processes left of theirs goes.

    A folder also for a file: a library that writes to a temporary name of its own (safetensors does) does so inside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{path.name}.tmp-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"  # of this machine
    for left in path.parent.glob(f"{escape(stem)}*-*"):
        owner = left.name.removeprefix(stem).partition("-")[0]
        if owner.isdecimal() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = path.with_name(f"{stem}{os.getpid()}-{secrets.token_hex(4)}")
    folder.mkdir()
    return folder


def _alive(process: int) -> bool:
    """Whether this machine has a process of that number; where that cannot be asked, it has."""
    if os.name != "posix":  # elsewhere the question would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write a file to; renames it to ``path`` when the block ends without an
    error.

    Missing parent folders are made. The file gets the mode that the user's umask gives (safetensors would leave it
    readable by its owner alone). After an exception the temporary file is removed and ``path`` is as it was.
    """
    path = Path(path)
    folder = _temporary_folder(path)
    temporary = folder / path.name
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write to a full disk does not say where
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Writes ``data`` to ``path``; a reader sees the old content or all of the new."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_together(files: Mapping[Path, bytes]) -> None:
    """Like `atomic_write_bytes` for files that belong together: none is replaced before all are written."""
    with ExitStack() as stack:
        for path, data in files.items():
            stack.enter_context(atomic_path(path)).write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Like `atomic_write_bytes`, for text: UTF-8, line ends as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def json_bytes(value: Any) -> bytes:
    """JSON for people to read: indented, UTF-8, a final newline.

    Raises:
        ValueError: a number is not finite; JSON has no way to write it.
    """
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Like `atomic_write_bytes`, for a JSON-able value (see `json_bytes`)."""
    atomic_write_bytes(path, json_bytes(value))


def cached_json(path: Path | None, kind: type) -> Any:
    """What a cache file holds, or None: there is none, or it is damaged or no ``kind``, and is made anew."""
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # JSON and UTF-8 errors are of this kind
        return None
    return found if isinstance(found, kind) else None


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; it becomes ``path``, replacing what was there, when the block ends
    well.

    A folder that is not empty cannot be replaced in one step, so the old one is moved aside first. A process
    killed between the two renames leaves it beside the target as ``.NAME.previous``; the next call puts it
    back.
    """
    path = Path(path)
    previous = path.with_name(f".{path.name}.previous")
    if previous.is_dir() and not path.exists():
        os.replace(previous, path)
    temporary = _temporary_folder(path)
    mode = temporary.stat().st_mode & 0o666
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(file.stat().st_mode & 0o777 | mode)
        shutil.rmtree(previous, ignore_errors=True)
        if path.exists():
            os.replace(path, previous)
        try:
            os.replace(temporary, path)
        except BaseException:
            if previous.exists():
                os.replace(previous, path)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file's content is on the disk, so that a rename never precedes the bytes it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content as 64 hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
