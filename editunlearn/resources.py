"""Files that ship with the package: ``hparams/`` and ``data/``, from a checkout or from an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from editunlearn.errors import InputError

Kind = Literal["hparams", "data"]


def shipped_dir(kind: Kind) -> Path:
    """Folder of the shipped files: inside the package when installed, else beside it in the checkout."""
    package = Path(__file__).parent
    installed = package / "_shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def shipped_names(kind: Kind) -> list[str]:
    """Relative names of all shipped files of a kind, sorted, with ``/`` as separator."""
    root = shipped_dir(kind)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def shipped_path(kind: Kind, name: str) -> Path:
    """Path of one shipped file.

    Raises:
        InputError: no such file; the message lists what there is.
    """
    path = shipped_dir(kind) / name
    if not path.is_file():
        known = ", ".join(shipped_names(kind)) or "none (the installation is incomplete)"
        raise InputError(f"no shipped {kind} file {name!r}. There are: {known}.")
    return path
