"""Every heavy stage against the literal way of the public implementations, and against the machine, in one run.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --out benchmarks/results/speed.json

On a CPU the seconds are CPU seconds of one thread; on a GPU they are wall seconds with the device idle before and
after. The literal side works in float32 as published, ours in the model's dtype. The literal way is measured on few
facts, steps and tokens, since its cost is the same for each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import literal
import torch
from torch import Tensor

from editunlearn.artifacts import atomic_write_json

T = TypeVar("T")
LAYERS = [4, 5, 6, 7, 8]
STAGES = ("statistics", "values", "solve", "null_space", "insertion", "end_to_end")
TARGET = "refusal:I don't know."


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


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative difference (Frobenius)."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@dataclass
class Bench:
    """The models, facts and settings that the stages share, and what they found."""

    args: argparse.Namespace
    slow: Any
    fast: Any
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from editunlearn.editors import contexts
        from editunlearn.facts.readers import load_facts
        from editunlearn.facts.targets import fill_targets
        from editunlearn.hparams import load_hparams
        from editunlearn.lm.loading import default_cache_dir

        self.cache = default_cache_dir()
        settings = [f"layers={LAYERS}", "value.stop_loss=0", f"value.steps={self.args.steps}", "moments.tokens=20000"]
        self.hp = load_hparams("paper/memit", set=settings)
        facts = load_facts(Path("data/general_facts.jsonl"))
        self.facts = fill_targets(facts[:: len(facts) // self.args.facts][: self.args.facts], self.args.target, seed=0)
        texts = contexts.prefixes(self.fast, self.hp.context_prefixes, self.cache)
        self.rows = contexts.forget_rows(self.fast, self.facts, texts, self.hp)
        self.problems = contexts.problems(self.fast, self.facts, self.rows, [], self.hp)
        self.sites = self.fast.layout.sites(LAYERS)
        self.block = self.fast.layout.block_name(LAYERS[-1])

    def note(self, stage: str, literal_seconds: float, our_seconds: float, unit: str, **more: Any) -> None:
        """Keep and print one comparison; ``unit`` says what the seconds are of."""
        line = {"unit": unit, "literal": literal_seconds, "ours": our_seconds, "ratio": literal_seconds / our_seconds}
        self.found[stage] = {**line, **more}
        rest = "; ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
        sys.stdout.write(
            f"{stage}: {literal_seconds:.4g} -> {our_seconds:.4g} {unit}, {line['ratio']:.1f} times; {rest}\n"
        )
        sys.stdout.flush()

    # --- stages

    def values(self) -> None:
        """Values: seconds per fact and step."""
        from editunlearn.editors import values

        few, v = self.args.literal_facts, self.hp.value
        steps = self.args.literal_steps
        options = {"lr": v.lr, "clamp": v.clamp, "decay": v.weight_decay, "kl": v.kl}

        def slowly() -> list[tuple[Tensor, Tensor, list[float]]]:
            return [
                literal.value(self.slow, p.rows, p.pinned, self.block, steps=steps, **options)
                for p in self.problems[:few]
            ]

        theirs, old = timed(self.slow.device, slowly)
        same = values.optimise(
            self.slow, self.problems[:few], [self.block], v.model_copy(update={"steps": steps}), tokens=self.args.tokens
        )
        difference = apart(same.change[:, 0], torch.stack([change for _, change, _ in old]))
        ours, _ = timed(
            self.fast.device,
            lambda: values.optimise(self.fast, self.problems, [self.block], v, tokens=self.args.tokens),
        )
        self.note(
            "values",
            theirs / few / steps,
            ours / len(self.problems) / v.steps,
            "s per fact and step",
            facts=len(self.problems),
            change_apart_in_float32=difference,
        )


def main() -> None:
    """Run the stages."""
    from editunlearn.lm.loading import load
    from editunlearn.pipeline import environment

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    p.add_argument("--facts", type=int, default=50)
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--target", default=TARGET)
    p.add_argument("--tokens", type=int, default=2048, help="padded tokens of one batch of values")
    p.add_argument("--literal-facts", type=int, default=2)
    p.add_argument("--literal-steps", type=int, default=3)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    bench = Bench(args, load("demo", dtype="float32"), load("demo", dtype="bfloat16"))
    for stage in args.stages:
        getattr(bench, stage)()
    if args.out:
        atomic_write_json(args.out, {"environment": dict(environment()), "stages": bench.found})


if __name__ == "__main__":
    main()
