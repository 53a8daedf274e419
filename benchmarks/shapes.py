"""Every stage of an edit on random models in the form of Llama, from 100M parameters up, against the machine's limits.

    OMP_NUM_THREADS=1 python benchmarks/shapes.py --shapes 100m 400m --out benchmarks/results/shapes.json
    python benchmarks/shapes.py --shapes 8b --dtype bfloat16 --device cuda --facts 1000 --steps 25 --out shapes.json

What a stage costs does not depend on what a model knows. On a CPU the seconds are CPU seconds of one thread; on a GPU
wall seconds with the device idle before and after. A run before the timed one counts the floating-point operations of
products and attention, and makes what a device makes once; factorisations are not counted, so that solves have no share
of the machine. The limits are measured in the same run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import random_models
import torch
from measuring import counted, listed, rates, timed

from editunlearn import editors
from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.console import Console
from editunlearn.editors.flow import Flow

if TYPE_CHECKING:
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.lm.loading import LM


def _shape(width: int, inner: int, blocks: int, words: int, heads: int = 16, shared: int = 8) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "vocab_size": words,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
    }


SHAPES = {
    "tiny": _shape(64, 160, 4, 2000, 4, 2),
    "100m": _shape(640, 2048, 16, 32_000, 8, 4),
    "400m": _shape(1024, 4096, 20, 32_000),
    "1b": _shape(2048, 8192, 16, 128_256, 32),
    "3b": _shape(3072, 8192, 28, 128_256, 24),
    "8b": _shape(4096, 14_336, 32, 128_256, 32),
}
"""The last three are those of Llama 3; ``tiny`` is for trying the benchmark itself."""
COLUMNS = ("shape", "parameters", "stage", "seconds", "of", "seconds_each", "share_of_machine", "peak_gb")


class Watched(Flow):
    """A flow of which somebody is told what stage runs."""

    watch: Callable[..., Any]

    def _moments(self, *args: Any) -> Any:
        return self.watch("statistics", super()._moments, *args)

    def _values(self, *args: Any) -> Any:
        return self.watch("values", super()._values, *args)

    def solve(self, *args: Any) -> Any:
        """See :class:`Flow`."""
        return self.watch("solve", super().solve, *args)

    def _refine(self, *args: Any) -> Any:
        return self.watch("refine", super()._refine, *args)


def model(shape: str, dtype: str, device: str) -> LM:
    """A random model and its tokenizer."""
    from editunlearn.lm.loading import LM
    from editunlearn.lm.recognise import layout_of

    made = random_models.llama(SHAPES[shape], dtype, device)
    return LM(made, random_models.tokenizer(SHAPES[shape]["vocab_size"]), layout_of(made, made.config), shape)


def asked(facts: int) -> ForgetRequest:
    """Shipped facts to forget with a refusal, in turn with numbers of their own where there are not as many."""
    from dataclasses import replace

    from editunlearn.facts.readers import load_facts
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.facts.targets import fill_targets
    from editunlearn.resources import shipped_path

    there = load_facts(shipped_path("data", "general_facts.jsonl"))
    chosen = [replace(there[i % len(there)], id=str(i)) for i in range(facts)]
    return ForgetRequest(tuple(fill_targets(chosen, "refusal", seed=0)), tuple(there[-20:]))


def once(lm: LM, args: argparse.Namespace, watch: Callable[..., Any]) -> int:
    """One edit, of which nothing is there before; returns how many tokens its second moments are of."""
    from editunlearn.editors import moments
    from editunlearn.editors.past import PastKeys
    from editunlearn.hparams import load_hparams
    from editunlearn.lm import room
    from editunlearn.lm.layers import resolve_layers
    from editunlearn.workspace import Workspace

    settings = [f"value.steps={args.steps}", "value.stop_loss=0", f"refine.steps={args.refine_steps}"]
    hp, work, quiet = load_hparams(args.method, set=[*settings, *args.set]), Workspace(None, {}), Console(quiet=True)
    method = editors.module(args.method)
    layers, _ = resolve_layers(hp.layers, lm.layout.num_layers(lm.model), method.DEFAULT_LAYERS)
    hp = room.settled(lm, hp, layers, work, quiet)
    with tempfile.TemporaryDirectory() as cache:
        flow = Watched(lm, asked(args.facts), hp, method, PastKeys(), work, Path(cache), quiet)  # type: ignore[arg-type]
        flow.watch = watch
        flow.run()
    return sum(map(len, moments.pieces(lm, lm.layout.sites(layers), hp.moments)))  # type: ignore[attr-defined]


def rows_of(shape: str, lm: LM, args: argparse.Namespace, machine: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each stage."""
    flop: dict[str, int] = {}
    rows: dict[str, dict[str, Any]] = {}
    on_gpu = lm.device.type == "cuda"

    def count(stage: str, run: Callable[..., Any], *given: Any) -> Any:
        made: list[Any] = []
        flop[stage] = counted(lambda: made.append(run(*given)))
        return made[0]

    def clock(stage: str, run: Callable[..., Any], *given: Any) -> Any:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        spent, made = timed(lm.device, lambda: run(*given))
        rows[stage] = {"seconds": spent, "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None}
        return made

    once(lm, args, count)
    tokens = once(lm, args, clock)
    size = sum(p.numel() for p in lm.model.parameters())
    units = {
        "statistics": (tokens, "tokens"),
        "values": (args.facts * args.steps, "facts and steps"),
        "solve": (args.facts, "facts"),
        "refine": (args.refine_steps, "steps"),
    }
    found = []
    for stage, row in rows.items():
        number, unit = units[stage]
        share = flop[stage] / row["seconds"] / machine["product_flop_per_second"] if stage != "solve" else None
        about = {"shape": shape, "parameters": size, "stage": stage, "of": f"{number:,} {unit}", "flop": flop[stage]}
        found.append({**about, **row, "seconds_each": row["seconds"] / number, "share_of_machine": share})
        sys.stdout.write(listed(found[-1]) + "\n")
        sys.stdout.flush()
    return found


def table(command: str, record: dict[str, Any]) -> str:
    """Markdown of all rows."""
    lines = [f"    {command}", "", listed(record["environment"]), "", "machine: " + listed(record["machine"]), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in record["rows"]:
        share = row["share_of_machine"]
        shown = {**row, "share_of_machine": None if share is None else f"{share:.0%}"}
        cells = ("" if (v := shown[c]) is None else f"{v:,}" if isinstance(v, int) else _short(v) for c in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """All shapes, one after the other; each row is written when it is there."""
    from editunlearn.pipeline import environment

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["100m"])
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--method", choices=("memit", "alphaedit", "emmet"), default="memit")
    p.add_argument("--facts", type=int, default=20)
    p.add_argument("--steps", type=int, default=5, help="of the values")
    p.add_argument("--refine-steps", type=int, default=5)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings, as for apply")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    command = shlex.join(["python", "benchmarks/shapes.py", *sys.argv[1:]])
    machine = rates(torch.device(args.device), getattr(torch, args.dtype))
    record: dict[str, Any] = {"command": command, "environment": dict(environment()), "machine": machine, "rows": []}
    for shape in args.shapes:
        record["rows"] += rows_of(shape, model(shape, args.dtype, args.device), args, machine)
        atomic_write_json(args.out, record)
        atomic_write_text(args.out.with_suffix(".md"), table(command, record))


if __name__ == "__main__":
    main()
