"""What a run takes, counted while it runs: time, memory, floating-point operations, tokens; and the budget it has."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from editunlearn.errors import EditUnlearnError, InputError

if TYPE_CHECKING:
    from editunlearn.deltas.kinds import Delta
    from editunlearn.lm.loading import LM

KINDS = ("none", "wall:SECONDS", "flops:N")


class OverBudget(EditUnlearnError):
    """A run was stopped because its budget was spent."""


@dataclass(frozen=True)
class Budget:
    """What each run may take; None: as much as it likes.

    Attributes:
        wall: seconds. flops: floating-point operations, as a :class:`Meter` counts them.
    """

    wall: float | None = None
    flops: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``none``, ``wall:600``, ``flops:2e15``.

        Raises:
            InputError: none of them, or not above 0.
        """
        kind, _, amount = text.partition(":")
        if text == "none":
            return cls()
        try:
            value = float(amount)
        except ValueError:
            value = 0.0
        if kind not in ("wall", "flops") or not 0 < value < float("inf"):
            raise InputError(f"--budget {text}: write {', '.join(KINDS[:-1])} or {KINDS[-1]}, with a number above 0.")
        return cls(wall=value) if kind == "wall" else cls(flops=value)

    def __bool__(self) -> bool:
        return self.wall is not None or self.flops is not None

    def __str__(self) -> str:
        return f"wall:{self.wall:g}" if self.wall else f"flops:{self.flops:g}" if self.flops else "none"


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what passes between ``with`` and its end, and ends it with OverBudget when a budget is spent.

    Attributes:
        flops: of matrix products, convolutions and the attention kernels that torch has a formula for, forward and
            backward: two for each multiplication with its addition. Decompositions (Cholesky, eigenvalues) and what is
            done entry by entry are not counted.
        tokens: that entered the model, padding included, once for each pass.
        seconds: wall time.
    """

    def __init__(self, lm: LM, budget: Budget | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lm, self.budget = lm, budget or Budget()
        self.flops, self.tokens, self.seconds = 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
            self._check()
        return out

    def _check(self) -> None:
        limit = self.budget
        if limit.flops is not None and self.flops > limit.flops:
            raise OverBudget(f"over the budget of {limit.flops:.3g} floating-point operations")
        if limit.wall is not None and time.perf_counter() - self._began > limit.wall:
            raise OverBudget(f"over the budget of {limit.wall:g} s")

    @contextmanager
    def running(self) -> Iterator[Meter]:
        """Count inside.

        Raises:
            OverBudget: the budget is spent.
        """
        seen = self.lm.model.get_input_embeddings().register_forward_hook(self._see)
        self._began = time.perf_counter()
        try:
            with self:
                yield self
            self._check()
        finally:
            self.seconds = time.perf_counter() - self._began
            seen.remove()

    def _see(self, _: Any, args: Any, output: torch.Tensor) -> None:
        self.tokens += output.shape[:-1].numel()


def reset_peak_memory() -> bool:
    """Let the peak of this process's memory begin anew; False where that cannot be done (only Linux and CUDA can)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return sys.platform == "linux"


def peak_memory() -> int | None:
    """Bytes since :func:`reset_peak_memory`, on the GPU where there is one, the model itself included."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def share_changed(lm: LM, delta: Delta) -> float:
    """Of all the model's numbers, the share that a delta changes, in [0, 1]; a memory beside them changes none."""
    from editunlearn.deltas.dense import DenseDelta
    from editunlearn.deltas.lowrank import LowRankDelta

    if isinstance(delta, DenseDelta):
        changed = sum(int(change.left.count_nonzero()) for change in delta.factors.values())
    elif isinstance(delta, LowRankDelta):
        changed = sum(out * width for out, width in (factors.shape for factors in delta.factors.values()))
    else:
        changed = 0
    return changed / sum(p.numel() for p in lm.model.parameters())
