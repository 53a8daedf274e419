"""Finished pieces of a run on disk, so that interrupted work goes on where it stopped.

A workspace belongs to one exact set of inputs: its folder name is the hash of all of them. A run with other inputs
never finds it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.artifacts import atomic_path

if TYPE_CHECKING:
    from torch import Tensor


def key_of(inputs: Mapping[str, Any]) -> str:
    """Hash of everything that a result depends on: 32 hex digits of SHA-256 over sorted JSON.

    Raises:
        TypeError: something in ``inputs`` is not plain JSON.
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


class Workspace:
    """A folder of named tensors and JSON values.

    Args:
        root: parent folder; None keeps nothing (every ``get`` is None).
        inputs: everything that the pieces depend on.
        fresh: throw away what an earlier run left.
    """

    def __init__(self, root: Path | None, inputs: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.folder = root / key_of(inputs) if root is not None else None
        if fresh:
            self.remove()

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that were put under ``name``, or None; a damaged file counts as none."""
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError:
            return None

    def holds(self, name: str) -> bool:
        """Whether :meth:`get` would find something, seen without reading it."""
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").is_file():
            return False
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):
                return True
        except SafetensorError:
            return False

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``name``, replacing what was there in one step."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        with atomic_path(self.folder / f"{name}.safetensors") as path:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)

    def drop(self, name: str) -> None:
        """Forget one piece."""
        if self.folder is not None:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)
