"""Bytes of the tensors that are there at one time, counted operation by operation: the same on every machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is made between ``with`` and its end, as long as it lives; what was there before does not count.

    What an operation takes and gives back inside of itself is not seen, and what is read from a file only when
    something is done to it.

    Attributes:
        bytes: that are there now. peak: the most that there were.
    """

    def __init__(self, *before: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.peak = 0, 0
        own = (t for module in before for t in (*module.parameters(), *module.buffers()))
        self._known = {t.untyped_storage()._cdata for t in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((out, args)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def peak(run: Any, *models: torch.nn.Module) -> tuple[int, Any]:
    """Most bytes that ``run`` has at one time beside the models, and what it makes."""
    with Held(*models) as held:
        made = run()
    return held.peak, made
