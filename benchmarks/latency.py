"""What memories of 1 to 200 facts cost while the model is used; an edit of weights costs nothing once it is merged.

    OMP_NUM_THREADS=1 python benchmarks/latency.py --out benchmarks/results/latency.json

Milliseconds of a prompt of 64 tokens and of each token behind it, of the model alone, beside a memory that sleeps and
beside one that every prompt wakes; medians of several rounds in turn. What a memory holds does not change what it
costs, so that these are random ones of the sizes that the methods make.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.deltas.codebook import Codebook
from editunlearn.deltas.memory import make_memory
from editunlearn.deltas.remembering import Memory
from editunlearn.deltas.side import SideMemory
from editunlearn.deltas.standalone import cost
from editunlearn.editors import module
from editunlearn.facts.records import Fact
from editunlearn.hparams import load_hparams
from editunlearn.lm.layers import resolve_layers
from editunlearn.lm.loading import LM, load
from editunlearn.pipeline import environment

ENTRIES = 3
"""Of GRACE for each fact, about as many as it makes of a prompt and six contexts."""
ROUNDS = 5
STATES = ("base", "with the memory", "with it, awake")


def main() -> None:
    """All sizes."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--sizes", type=int, nargs="+", default=(1, 10, 50, 200))
    p.add_argument("--rounds", type=int, default=ROUNDS)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    lm = load(args.model)
    runs = [measured(lm, method, size, args.rounds) for method in ("grace", "wise") for size in args.sizes]
    atomic_write_json(args.out, {"runs": runs, "environment": dict(environment())})
    lines = ["    OMP_NUM_THREADS=1 python benchmarks/latency.py --out benchmarks/results/latency.json", ""]
    lines += [
        "| method | facts | MB | a prompt, ms: alone | asleep | awake | a token, ms: alone | asleep | awake |",
        "|" + "---|" * 9,
    ]
    for run in runs:
        cells = [run["method"], run["facts"], *(f"{run[name]:.3g}" for name in list(run)[2:])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    atomic_write_text(args.out.with_suffix(".md"), "\n".join(lines) + "\n")


def memory_for(method: str, facts: int, shape: tuple[int, int]) -> Memory:
    """A random memory as large as the method's for so many facts, that no prompt wakes."""
    draw = torch.Generator().manual_seed(0)
    out, width = shape
    if method == "grace":
        keys = torch.randn(ENTRIES * facts, width, generator=draw)
        return Codebook(keys, torch.zeros(len(keys), out), torch.zeros(len(keys)), "prompt")
    hp: Any = load_hparams("wise")
    count = -(-facts // (hp.shards.size * hp.shards.per_memory))
    updates = 1e-3 * torch.randn(count, out, width, generator=draw)
    marks, owners = torch.randn(facts, width, generator=draw), (torch.arange(facts) * count // facts).float()
    return SideMemory(updates, torch.full((count,), 1e30), marks, owners, hp.routing.window, hp.routing.tokens)


def measured(lm: LM, method: str, facts: int, rounds: int) -> dict[str, Any]:
    """Medians of all rounds."""
    (block,), _ = resolve_layers("auto", lm.layout.num_layers(lm.model), module(method).DEFAULT_LAYERS)
    name = lm.layout.site(block).name
    out, width = lm.layout.read_weight(lm.model, name).shape
    memory = memory_for(method, facts, (out, width))
    asked = [Fact(str(number), "The", "x", "The", 0, target="y") for number in range(facts)]
    groups = [[fact.id for fact in asked[k :: memory.count]] for k in range(memory.count)]
    if method == "grace":
        groups = [[asked[k // ENTRIES].id] for k in range(memory.count)]
    delta = make_memory(
        lm,
        {name: memory},
        method=method,
        hparams={},
        facts=asked,
        entries={name: groups},
        target_strategy="y",
        seeds={},
    )
    found = [list(cost(lm, delta).values())[1:] for _ in range(rounds)]
    result: dict[str, Any] = {"method": method, "facts": facts, "mb": delta.nbytes / 1e6}
    for number, what in enumerate(("prompt", "token")):
        for column in STATES:
            numbers: Any = [one[number][column] for one in found]
            result[f"{what} {column}"] = statistics.median(numbers)
    return result


if __name__ == "__main__":
    main()
