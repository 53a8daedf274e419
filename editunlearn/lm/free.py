"""How much memory a device has left for this process."""

from __future__ import annotations

from pathlib import Path

import torch

MEMORY, OWN, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux says what is free for all, in which control groups this process is, and what is free there."""


def free_memory(device: torch.device) -> float | None:
    """Bytes that this process can still take there; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu" or not MEMORY.is_file():
        return None
    rows = (line.split() for line in MEMORY.read_text().splitlines())
    available = next((1024.0 * int(row[1]) for row in rows if row[0] == "MemAvailable:"), None)
    limits = [limit for limit in (available, *map(_left, _groups())) if limit is not None]
    return min(limits, default=None)


def _groups() -> list[Path]:
    """Folders of the control groups that this process is in, from its own up."""
    lines = OWN.read_text().splitlines() if OWN.is_file() else []
    paths = [Path(line.split(":", 2)[2]) for line in lines if line.startswith("0::")]
    return [GROUPS / above.relative_to("/") for path in paths for above in (path, *path.parents)]


def _left(group: Path) -> float | None:
    """Bytes that a control group lets its processes take; None: as many as there are."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    cached = next((int(size) for name, size in rows if name == "inactive_file"), 0)  # given up when it is needed
    return None if limit == "max" else max(0.0, float(int(limit) - used + cached))
