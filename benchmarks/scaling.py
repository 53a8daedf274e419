"""How the closed forms grow with the number of facts and with the width of a layer, beside the literal way.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out benchmarks/results/scaling.json

Random keys over a random second moment with a spectrum like a real one's. CPU seconds of one thread. The literal way is
left out where one solve of it would take longer than ``--patience``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import literal
import torch
from measuring import apart, listed, rates, timed
from torch import Tensor

from editunlearn.artifacts import atomic_write_json, atomic_write_text

CPU = torch.device("cpu")
WEIGHT, L2, THRESHOLD = 15_000.0, 10.0, 0.02


def moment_of(width: int, draw: torch.Generator) -> Tensor:
    """``C`` (width, width) float64 with eigenvalues from 30 down to 3e-4, most of them small."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))[0]
    return (basis * torch.logspace(1.5, -3.5, width, dtype=torch.float64)) @ basis.T


def solves(width: int, counts: list[int], out: int, patience: float) -> list[dict[str, Any]]:
    """One row for each number of facts: seconds of MEMIT's and AlphaEdit's solve; what ``C`` alone decides is there."""
    from editunlearn.numerics import projector, solve

    draw = torch.Generator().manual_seed(0)
    moment = moment_of(width, draw)
    root = torch.linalg.cholesky(moment + 1e-9 * torch.eye(width))
    prepared, inverse = timed(CPU, lambda: solve.inverse(moment))
    decomposed, project = timed(CPU, lambda: projector.null_space(moment, THRESHOLD, relative=False))
    dense = project(torch.eye(width, dtype=torch.float64)).float()
    rows = []
    for n in counts:
        keys = (3 * torch.randn(n, width, generator=draw, dtype=torch.float64) @ root.T).float()
        residuals = torch.randn(n, out, generator=draw)

        def memit(keys: Tensor = keys) -> Tensor:
            if len(keys) > width:
                return solve.recognisers_of_many(keys, WEIGHT * moment, 1.0)
            return solve.recognisers(keys, solve.Inverse(inverse, WEIGHT), 1.0)

        row: dict[str, Any] = {"width": width, "facts": n, "inverse": prepared, "null_space": decomposed}
        row["memit"], ours = timed(CPU, memit, 3 if n <= 1000 else 1)
        row["alphaedit"], projected = timed(
            CPU, lambda k=keys: solve.projected_recognisers(k, project, L2), 3 if n <= 1000 else 1
        )
        if 2e-11 * width**3 < patience:
            row["memit_literal"], theirs = timed(
                CPU, lambda k=keys, r=residuals: literal.memit_solve(moment, WEIGHT, k, r)
            )
            row["memit_apart"] = apart(residuals.double().T @ ours, theirs)
            row["alphaedit_literal"], theirs = timed(
                CPU, lambda k=keys, r=residuals: literal.alphaedit_solve(dense, k, torch.zeros_like(dense), r, L2)
            )
            row["alphaedit_apart"] = apart(residuals.double().T @ projected, theirs)
        rows.append(row)
        sys.stdout.write(listed(row) + "\n")
        sys.stdout.flush()
    return rows


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over facts, a panel for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, method in zip(axes, ("memit", "alphaedit"), strict=True):
        for color, width in enumerate(dict.fromkeys(row["width"] for row in rows)):
            own = [row for row in rows if row["width"] == width]
            for key, style in ((method, "o-"), (f"{method}_literal", "x--")):
                points = [(row["facts"], row[key]) for row in own if key in row]
                if points:
                    label = f"{width:,} wide" + (", literal" if "literal" in key else "")
                    axis.plot(*zip(*points, strict=True), style, color=f"C{color}", label=label)
        axis.set(xscale="log", yscale="log", xlabel="facts", title=f"{method}: one layer's solve")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds, one thread")
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def main() -> None:
    """All widths and numbers of facts."""
    from editunlearn.pipeline import environment

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    p.add_argument("--facts", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    p.add_argument("--out-width", type=int, default=640)
    p.add_argument("--patience", type=float, default=5.0, help="seconds of one literal solve, at most, about")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    found = [row for width in args.widths for row in solves(width, args.facts, args.out_width, args.patience)]
    command = "OMP_NUM_THREADS=1 " + shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    machine = rates(CPU, torch.float64)
    record = {"command": command, "environment": dict(environment()), "machine": machine, "rows": found}
    atomic_write_json(args.out, record)
    columns = ("width", "facts", "memit_literal", "memit", "alphaedit_literal", "alphaedit", "inverse", "null_space")
    lines = [f"    {command}", "", listed(environment()), "", "machine, float64: " + listed(machine), ""]
    lines += ["CPU seconds.", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in found:
        shown = (f"{row[c]:,}" if isinstance(row.get(c), int) else f"{row[c]:.3g}" if c in row else "" for c in columns)
        lines.append("| " + " | ".join(shown) + " |")
    atomic_write_text(args.out.with_suffix(".md"), "\n".join(lines) + "\n")
    figure(found, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
