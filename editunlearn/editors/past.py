"""Keys of earlier edits, as an explicit object: what sequential editing has to keep."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from editunlearn.artifacts import atomic_path
from editunlearn.errors import InputError


@dataclass(frozen=True)
class PastKeys:
    """Keys that earlier edits wrote, by module name, each (n, d_in) float32. Empty for a first edit."""

    keys: dict[str, Tensor] = field(default_factory=dict)

    def extended(self, new: dict[str, Tensor]) -> PastKeys:
        """These keys and ``new`` ones after them; neither object is changed."""
        names = sorted(self.keys.keys() | new.keys())
        return PastKeys({n: torch.cat([k[n].float() for k in (self.keys, new) if n in k]) for n in names})

    def digest(self) -> str:
        """Hash of all keys; "" when there are none."""
        parts = [n + hashlib.sha256(k.numpy().tobytes()).hexdigest() for n, k in sorted(self.keys.items())]
        return hashlib.sha256("".join(parts).encode()).hexdigest() if parts else ""

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        from safetensors.torch import save_file

        with atomic_path(Path(path)) as temporary:
            save_file(
                {n: k.contiguous() for n, k in self.keys.items()},
                temporary,
                {"format": "editunlearn.past_keys"},
            )

    @classmethod
    def load(cls, path: str | Path) -> PastKeys:
        """Read what ``save`` wrote.

        Raises:
            InputError: no such file, or not one of these.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("format") != "editunlearn.past_keys":
                    raise InputError(f"{path}: not a file of past keys.")
                keys = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read as past keys: {error}") from error
        bad = [name for name, key in keys.items() if key.ndim != 2 or not torch.isfinite(key).all()]
        if bad:
            raise InputError(f"{path}: {bad[0]} is no table of finite keys; give the file of a finished run.")
        return cls(keys)
