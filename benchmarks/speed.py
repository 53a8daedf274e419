"""Every heavy stage against the literal way of the public implementations, and against the machine, in one run.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --out benchmarks/results/speed.json

On a CPU the seconds are CPU seconds of one thread; on a GPU they are wall seconds with the device idle before and
after. The literal side works in float32 as published, ours in the model's dtype. The literal way is measured on few
facts, steps and tokens, since its cost is the same for each.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import literal
import torch
from measuring import apart, counted, listed, rates, table, timed
from torch import Tensor

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.console import Console
from editunlearn.numerics.moments import SecondMoment

CPU = torch.device("cpu")
LAYERS = [4, 5, 6, 7, 8]
STAGES = ("statistics", "values", "solve", "null_space", "insertion", "end_to_end")
THRESHOLD = 0.02
"""AlphaEdit's, absolute."""
TARGET = "refusal:I don't know."


@dataclass
class Bench:
    """The models, facts and settings that the stages share, and what they found."""

    args: argparse.Namespace
    slow: Any
    fast: Any
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from editunlearn.editors import contexts, moments
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
        second = moments.get(self.fast, self.sites, self.hp.moments, self.cache, Console(quiet=True))
        self.second = {name: one.moment for name, one in second.items()}
        self.block = self.fast.layout.block_name(LAYERS[-1])

    def note(self, stage: str, literal_seconds: float, our_seconds: float, unit: str, **more: Any) -> None:
        """Keep and print one comparison; ``unit`` says what the seconds are of.

        ``flop``: how many floating-point operations ours took in that unit; then the share of the machine's own rate.
        """
        line = {"unit": unit, "literal": literal_seconds, "ours": our_seconds, "ratio": literal_seconds / our_seconds}
        if "flop" in more:
            more["share_of_machine"] = more["flop"] / our_seconds / self.found["machine"]["product_flop_per_second"]
        self.found[stage] = {**line, **more}
        spent = f"{literal_seconds:.4g} -> {our_seconds:.4g} {unit}, {line['ratio']:.1f} times"
        sys.stdout.write(f"{stage}: {spent}; {listed(more)}\n")
        sys.stdout.flush()

    def machine(self) -> None:
        """The limits to compare with."""
        self.found["machine"] = rates(self.fast.device, self.fast.dtype)
        sys.stdout.write("machine: " + listed(self.found["machine"]) + "\n")

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

        def quickly(settings: Any = v) -> Any:
            return values.optimise(self.fast, self.problems, [self.block], settings, tokens=self.args.tokens)

        ours, _ = timed(self.fast.device, quickly)
        once, twice = (v.model_copy(update={"steps": steps}) for steps in (1, 2))
        self.note(
            "values",
            theirs / few / steps,
            ours / len(self.problems) / v.steps,
            "s per fact and step",
            facts=len(self.problems),
            change_apart_in_float32=difference,
            flop=(counted(lambda: quickly(twice)) - counted(lambda: quickly(once))) / len(self.problems),
        )

    def statistics(self) -> None:
        """Second moments of five layers: seconds per token; the literal way cuts documents at 2,048 tokens."""
        from editunlearn.editors import moments, statistics
        from editunlearn.facts.text import documents
        from editunlearn.lm.windows import windows

        hp = self.hp.moments.model_copy(update={"tokens": self.args.statistics_tokens})
        names = [s.name for s in self.sites]
        few = list(windows(self.slow, documents("general"), 2048, self.args.literal_tokens))
        theirs, _ = timed(self.slow.device, lambda: literal.statistics(self.slow, names, few))
        ours, _ = timed(self.fast.device, lambda: moments.get(self.fast, self.sites, hp, None, Console(quiet=True)))
        pieces = moments.pieces(self.fast, self.sites, hp)
        exact = literal.statistics(self.slow, names, pieces[:: max(1, len(pieces) // 20)])
        here = pieces[:: max(1, len(pieces) // 20)]
        rounded = {name: SecondMoment(len(exact[name])) for name in names}
        statistics.add_windows(self.fast, self.sites, rounded, here)
        self.note(
            "statistics",
            theirs / sum(map(len, few)),
            ours / sum(map(len, pieces)),
            "s per token, five layers",
            tokens=sum(map(len, pieces)),
            flop=counted(lambda: statistics.add_windows(self.fast, self.sites, {}, here)) / sum(map(len, here)),
            moment_apart_in_own_precision=max(apart(rounded[n].mean(), exact[n]) for n in names),
        )

    def solve(self) -> None:
        """One layer's closed form, what depends on the moment alone being there."""
        from editunlearn.numerics import projector, solve

        moment = self.second[self.sites[0].name].double()
        draw = torch.Generator().manual_seed(0)
        root = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment)))
        inverse, weight = solve.inverse(moment), self.hp.moments.weight
        project = projector.null_space(moment, THRESHOLD, relative=False)
        dense = literal.null_space(moment.float(), THRESHOLD)
        for n in self.args.solve_facts:
            keys = (3 * torch.randn(n, len(moment), generator=draw).double() @ root.T).float()
            residuals = torch.randn(n, 640, generator=draw)

            def memit(keys: Tensor = keys) -> Tensor:
                return solve.recognisers(keys, solve.Inverse(inverse, weight), 1.0)

            def alphaedit(keys: Tensor = keys) -> Tensor:
                return solve.projected_recognisers(keys, project, 10.0)

            theirs, old = timed(CPU, lambda k=keys, r=residuals: literal.memit_solve(moment, weight, k, r), 3)  # type: ignore[misc]
            ours, rows = timed(CPU, memit, 5)
            self.note(f"solve_memit_{n}", theirs, ours, "s per layer", apart=apart(residuals.double().T @ rows, old))
            cache = torch.zeros_like(dense)
            theirs, old = timed(
                CPU,
                lambda k=keys, r=residuals, c=cache: literal.alphaedit_solve(dense, k, c, r, 10.0),  # type: ignore[misc]
                3,
            )
            ours, rows = timed(CPU, alphaedit, 5)
            self.note(
                f"solve_alphaedit_{n}", theirs, ours, "s per layer", apart=apart(residuals.double().T @ rows, old)
            )

    def null_space(self) -> None:
        """AlphaEdit's projector of one layer, from its second moment."""
        from editunlearn.numerics import projector

        moment = self.second[self.sites[0].name]
        theirs, dense = timed(CPU, lambda: literal.null_space(moment, THRESHOLD))
        ours, found = timed(CPU, lambda: projector.null_space(moment, THRESHOLD, relative=False))
        difference = apart(found(torch.eye(len(moment), dtype=torch.float64)), dense)
        self.note("null_space", theirs, ours, "s per layer", apart=difference, kept=found.basis.shape[1])

    def insertion(self) -> None:
        """Keys, residuals, solves and writes of all layers, the values being given."""
        from editunlearn.editors import memit as method
        from editunlearn.editors import values
        from editunlearn.editors.contexts import ForgetRows
        from editunlearn.editors.flow import Flow
        from editunlearn.editors.moments import SiteMoment
        from editunlearn.editors.past import PastKeys
        from editunlearn.facts.records import ForgetRequest
        from editunlearn.workspace import Workspace

        n = self.args.insertion_facts
        rows = ForgetRows(self.rows.keys[: n * len(self.rows.targets[0])], self.rows.targets[:n], tuple(range(n)))
        quick = self.hp.value.model_copy(update={"steps": 2})
        found = values.optimise(self.slow, self.problems[:n], [self.block], quick)
        bare = [r[0] for r in rows.targets]
        wanted = found.clean[:, 0] + found.change[:, 0]
        weight = self.hp.moments.weight
        theirs, old = timed(
            self.slow.device,
            lambda: literal.insert(self.slow, LAYERS, rows.keys, bare, wanted, self.second, weight),
        )
        request = ForgetRequest(tuple(self.facts[:n]), (), (), ())
        spent = []
        with tempfile.TemporaryDirectory() as folder:
            second = {
                name: SiteMoment(moment, Workspace(Path(folder), {"site": name}))
                for name, moment in self.second.items()
            }
            for lm in (self.slow, self.fast):
                flow = Flow(lm, request, self.hp, method, PastKeys(), Workspace(None, {}), None, Console(quiet=True))
                flow.solve(self.sites, rows, [], second, found)  # the inverses are then there
                spent.append(timed(lm.device, lambda f=flow: f.solve(self.sites, rows, [], second, found)))  # type: ignore[misc]
        (_, (in_float32, _)), (ours, _) = spent
        exact = {name: left.double() @ right.double() for name, (left, right) in in_float32.items()}
        self.note(
            "insertion",
            theirs,
            ours,
            f"s, {n} facts",
            update_apart_in_float32=max(apart(exact[name], old[name]) for name in old),
        )

    def end_to_end(self) -> None:
        """Values and insertion of all facts, composed of the stages above."""
        n = self.args.facts
        v, i = self.found["values"], self.found["insertion"]
        scale = n / self.args.insertion_facts
        theirs = v["literal"] * n * self.args.steps + i["literal"] * scale
        ours = v["ours"] * n * self.args.steps + i["ours"] * scale
        self.note("end_to_end", theirs, ours, f"s, {n} facts, statistics given; composed")


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
    p.add_argument("--statistics-tokens", type=int, default=20_000)
    p.add_argument("--literal-tokens", type=int, default=2_000)
    p.add_argument("--solve-facts", type=int, nargs="+", default=[10, 100, 1000])
    p.add_argument("--insertion-facts", type=int, default=10)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    bench = Bench(args, load("demo", dtype="float32"), load("demo", dtype="bfloat16"))
    for stage in ("machine", *args.stages):
        getattr(bench, stage)()
    if args.out:
        command = "OMP_NUM_THREADS=1 " + shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])
        atomic_write_json(args.out, {"command": command, "environment": dict(environment()), "stages": bench.found})
        atomic_write_text(args.out.with_suffix(".md"), table(command, dict(environment()), bench.found))


if __name__ == "__main__":
    main()
