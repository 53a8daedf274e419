"""Clocks, counters and tables that the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


def seconds(device: torch.device) -> float:
    """A clock: CPU seconds of this process, or wall seconds once a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def timed(device: torch.device, run: Callable[[], T], repeats: int = 1) -> tuple[float, T]:
    """Median seconds, and what the last call returned."""
    spent = []
    for _ in range(repeats):
        start = seconds(device)
        result = run()
        spent.append(seconds(device) - start)
    return sorted(spent)[len(spent) // 2], result


def counted(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative difference (Frobenius)."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine gives: its best matrix product in ``dtype`` and in float32, and copying memory."""
    found = {}
    for name, kind in (("product_flop_per_second", dtype), ("product_flop_per_second_float32", torch.float32)):
        a, b = (torch.randn(2048, 2048, device=device).to(kind) for _ in range(2))
        spent = [timed(device, lambda a=a, b=b: a @ b)[0] for _ in range(6)]  # type: ignore[misc]
        found[name] = 2 * 2048**3 / min(spent)
    big = torch.ones(1 << 26, device=device)
    other = torch.empty_like(big)
    found["copy_bytes_per_second"] = 8 * big.numel() / timed(device, lambda: other.copy_(big), 5)[0]
    return found


def listed(values: Mapping[str, Any], without: tuple[str, ...] = ()) -> str:
    """Names and values in one line."""
    shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in values.items() if k not in without}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


COLUMNS = ("stage", "of", "literal, s", "ours, s", "ratio", "share of the machine", "and")


def table(command: str, environment: Mapping[str, str], found: Mapping[str, Any]) -> str:
    """Markdown of all stages."""
    lines = [f"    {command}", "", listed(environment), "", "machine: " + listed(found["machine"]), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for stage, line in found.items():
        if stage != "machine":
            share = f"{line['share_of_machine']:.0%}" if "share_of_machine" in line else ""
            spent = [f"{line['literal']:.4g}", f"{line['ours']:.4g}", f"{line['ratio']:.1f}"]
            rest = listed(line, ("unit", "literal", "ours", "ratio", "share_of_machine", "flop"))
            lines.append("| " + " | ".join([stage, line["unit"], *spent, share, rest]) + " |")
    return "\n".join(lines) + "\n"
