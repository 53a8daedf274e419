"""Second moments by one process and by two: tokens a second, and how alike the moments are.

    python benchmarks/processes.py --out benchmarks/results/processes.json

Every process has one thread; for comparison one process with two is run as well. The clock starts when all have loaded
the model and read a few tokens. Where other programs use the machine, tokens per CPU second and the shares of the
processes say more than the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNS = {"one process": (1, 1), "one process, two threads": (1, 2), "two processes": (2, 1)}
"""How many processes, with how many threads each."""


def measure(args: argparse.Namespace) -> None:
    """One process's part: its seconds go to a file, the first one's moments as well."""
    import torch
    from safetensors.torch import save_file

    from editunlearn.console import Console
    from editunlearn.editors import moments
    from editunlearn.hparams import load_hparams
    from editunlearn.lm.layers import resolve_layers
    from editunlearn.lm.loading import load
    from editunlearn.lm.processes import joined

    hp = load_hparams("memit", set=[f"moments.tokens={args.tokens}"])
    few = hp.moments.model_copy(update={"tokens": 8 * hp.moments.length})
    with joined() as here:
        lm, quiet = load(args.model), Console(quiet=True)
        lm.among = here
        layers, _ = resolve_layers("auto", lm.layout.num_layers(lm.model), (0.06, 0.12, 0.18, 0.24))
        sites = lm.layout.sites(layers)
        moments.get(lm, sites, few, None, quiet)
        here.each(lambda: None)
        wall, cpu = time.perf_counter(), time.process_time()
        found = moments.get(lm, sites, hp.moments, None, quiet)
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    spent["tokens"] = sum(map(len, moments.pieces(lm, sites, hp.moments)))
    spent["threads"] = torch.get_num_threads()
    (args.part / f"{here.rank}.json").write_text(json.dumps(spent))
    if here.first:
        save_file({name: one.moment for name, one in found.items()}, args.part / "moments.safetensors")


def launch(args: argparse.Namespace, processes: int, threads: int, part: Path) -> list[dict[str, float]]:
    """What each of some processes spent."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [sys.executable, __file__, "--model", args.model, "--tokens", str(args.tokens), "--out", str(args.out)]
    common = {**os.environ, "OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [*command, "--part", str(part)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
        )
        for rank in range(processes)
    ]
    if any([process.wait() for process in running]):
        raise SystemExit("a process failed")
    return [json.loads((part / f"{rank}.json").read_text()) for rank in range(processes)]


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    head = ["run", "tokens", "seconds", "tokens a second", "tokens a CPU second", "CPU seconds of each", "apart"]
    lines = [f"    {found['command']}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, run in found["runs"].items():
        each = ", ".join(f"{spent:.1f}" for spent in run["cpu_seconds"])
        cells = [name, f"{run['tokens']:,}", f"{run['seconds']:.1f}", f"{run['tokens_per_second']:.0f}"]
        cells += [f"{run['tokens_per_cpu_second']:.0f}", each, f"{run['apart']:.1g}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Two processes have {found['speed_up']:.2f} times the throughput of one."]
    busy = f"Load of the machine before: {found['load_before']:.1f} on {os.cpu_count()} cores."
    return "\n".join([*lines, busy, ""])


def main() -> None:
    """All runs, one after the other."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--tokens", type=int, default=60000)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        measure(args)
        return
    from safetensors.torch import load_file

    from editunlearn.artifacts import atomic_write_json, atomic_write_text

    found: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/processes.py", *sys.argv[1:]]), "runs": {}}
    found["load_before"] = os.getloadavg()[0]
    alone: dict[str, Any] = {}
    for name, (processes, threads) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            spent = launch(args, processes, threads, Path(folder))
            moments = load_file(Path(folder) / "moments.safetensors")
        alone = alone or moments
        tokens, wall = spent[0]["tokens"], max(one["wall"] for one in spent)
        cpu = [one["cpu"] for one in spent]
        found["runs"][name] = {
            "tokens": tokens,
            "seconds": wall,
            "tokens_per_second": tokens / wall,
            "tokens_per_cpu_second": tokens / sum(cpu),
            "cpu_seconds": cpu,
            "apart": max(float((moments[m] - alone[m]).norm() / alone[m].norm()) for m in alone),
        }
        sys.stdout.write(f"{name}: {found['runs'][name]}\n")
        sys.stdout.flush()
    speeds = {name: run["tokens_per_second"] for name, run in found["runs"].items()}
    found["speed_up"] = speeds["two processes"] / speeds["one process"]
    atomic_write_json(args.out, found)
    atomic_write_text(args.out.with_suffix(".md"), table(found))


if __name__ == "__main__":
    main()
