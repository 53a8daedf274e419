"""Every heavy stage against the literal way of the public implementations, and against the machine, in one run.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --out benchmarks/results/speed.json

On a CPU the seconds are CPU seconds of one thread; on a GPU they are wall seconds with the device idle before and
after. The literal side works in float32 as published, ours in the model's dtype. The literal way is measured on few
facts, steps and tokens, since its cost is the same for each. Both sides compute no gradient of a weight.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import literal
import torch
from measuring import apart, counted, listed, rates, table, timed
from torch import Tensor

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.console import Console

if TYPE_CHECKING:
    from editunlearn.editors.contexts import ForgetRows
    from editunlearn.editors.moments import SiteMoment
    from editunlearn.editors.value_types import Problem, Values
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

CPU = torch.device("cpu")
LAYERS = [4, 5, 6, 7, 8]
STAGES = ("statistics", "values", "values_small_vocabulary", "values_refusal", "solve", "null_space", "insertion")
THRESHOLD = 0.02
"""AlphaEdit's, absolute."""
ONE_TOKEN = "empty"
"""A target of one token, as those of the published data sets nearly all are."""
REFUSAL = "refusal:I don't know."
VOCABULARY = 32_768


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
        from editunlearn.hparams import load_hparams
        from editunlearn.lm.loading import default_cache_dir

        self.cache = default_cache_dir()
        settings = [f"layers={LAYERS}", "value.stop_loss=0", f"value.steps={self.args.steps}", "moments.tokens=20000"]
        settings = [f"layers={LAYERS}", "value.stop_loss=0", f"value.steps={self.args.steps}", "moments.tokens=20000"]
        self.hp = load_hparams("paper/memit", set=settings)
        found = load_facts(Path("data/general_facts.jsonl"))
        self.chosen = found[:: len(found) // self.args.facts][: self.args.facts]
        self.texts = contexts.prefixes(self.fast, self.hp.context_prefixes, self.cache)
        self.sites = self.fast.layout.sites(LAYERS)
        second = moments.get(self.fast, self.sites, self.hp.moments, self.cache, Console(quiet=True))
        self.second = {name: one.moment for name, one in second.items()}
        self.block = self.fast.layout.block_name(LAYERS[-1])

    def asked(self, target: str) -> tuple[list[Fact], ForgetRows, list[Problem]]:
        """The facts with this target, their rows and what their values are optimised on."""
        from editunlearn.editors import contexts
        from editunlearn.facts.targets import fill_targets

        facts = fill_targets(self.chosen, target, seed=0)
        rows = contexts.forget_rows(self.fast, facts, self.texts, self.hp)
        return facts, rows, contexts.problems(self.fast, facts, rows, [], self.hp)

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
        """Values for targets of one token."""
        self._values("values", ONE_TOKEN)

    def values_small_vocabulary(self) -> None:
        """The same with the output head cut to a vocabulary that is more common."""
        with small_vocabulary(self.slow, VOCABULARY), small_vocabulary(self.fast, VOCABULARY):
            self._values("values_small_vocabulary", ONE_TOKEN)

    def values_refusal(self) -> None:
        """Values for a sentence of seven tokens."""
        self._values("values_refusal", REFUSAL)

    def _values(self, name: str, target: str) -> None:
        """Seconds per fact and step, all that comes before the first step included."""
        from editunlearn.editors import values

        few, v = self.args.literal_facts, self.hp.value
        steps = self.args.literal_steps
        options = {"lr": v.lr, "clamp": v.clamp, "decay": v.weight_decay, "kl": v.kl}
        _, _, problems = self.asked(target)

        def slowly() -> list[tuple[Tensor, Tensor, list[float]]]:
            return [
                literal.value(self.slow, p.rows, p.pinned, self.block, steps=steps, **options) for p in problems[:few]
            ]

        theirs, old = timed(self.slow.device, slowly)
        same = values.optimise(
            self.slow, problems[:few], [self.block], v.model_copy(update={"steps": steps}), tokens=self.args.tokens
        )
        difference = apart(same.change[:, 0], torch.stack([change for _, change, _ in old]))

        def quickly(settings: Any = v) -> Any:
            return values.optimise(self.fast, problems, [self.block], settings, tokens=self.args.tokens)

        ours, _ = timed(self.fast.device, quickly)
        once, twice = (v.model_copy(update={"steps": steps}) for steps in (1, 2))
        self.note(
            name,
            theirs / few / steps,
            ours / len(problems) / v.steps,
            "s per fact and step",
            facts=len(problems),
            change_apart_in_float32=difference,
            flop=(counted(lambda: quickly(twice)) - counted(lambda: quickly(once))) / len(problems),
        )

    def statistics(self) -> None:
        """Second moments of five layers: seconds per token.

        The literal way reads documents cut at 2,048 tokens; the shipped text is put together to such documents, since
        encyclopedia articles, which the public implementations read, are as long.
        """
        from editunlearn.editors import moments, statistics
        from editunlearn.facts.text import documents
        from editunlearn.lm.windows import windows

        hp = self.hp.moments.model_copy(update={"tokens": self.args.statistics_tokens})
        names = [s.name for s in self.sites]
        text = list(documents("general"))
        few = list(windows(self.slow, ["\n\n".join(text)], 2048, self.args.literal_tokens))
        short = list(windows(self.slow, text, 2048, self.args.literal_tokens))
        theirs, _ = timed(self.slow.device, lambda: literal.statistics(self.slow, names, few))
        on_short, _ = timed(self.slow.device, lambda: literal.statistics(self.slow, names, short))
        quiet = Console(quiet=True)
        ours, rounded = timed(self.fast.device, lambda: moments.get(self.fast, self.sites, hp, None, quiet))
        exact = moments.get(self.slow, self.sites, hp, None, quiet)
        pieces = moments.pieces(self.fast, self.sites, hp)
        here = pieces[:: max(1, len(pieces) // 20)]
        self.note(
            "statistics",
            theirs / sum(map(len, few)),
            ours / sum(map(len, pieces)),
            "s per token, five layers",
            tokens=sum(map(len, pieces)),
            literal_on_short_documents=on_short / sum(map(len, short)),
            flop=counted(lambda: statistics.add_windows(self.fast, self.sites, {}, here)) / sum(map(len, here)),
            moment_apart_in_own_precision=max(apart(rounded[n].moment, exact[n].moment) for n in names),
            recognisers_apart=self._apart_in_effect(exact, rounded),
        )

    def _apart_in_effect(self, exact: dict[str, SiteMoment], rounded: dict[str, SiteMoment]) -> float:
        """How far the recognisers of the facts are apart with two moments, the worst layer's."""
        from editunlearn.editors import keys, moments

        _, rows, _ = self.asked(ONE_TOKEN)
        found = keys.collect(self.slow, rows.keys, self.sites)
        weight = self.hp.moments.weight
        return max(
            moments.change_of_solve(
                rounded[name].moment, exact[name].moment, keys.average(found[name], len(self.chosen)), weight
            )
            for name in rounded
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
        facts, rows, problems = self.asked(ONE_TOKEN)
        quick = self.hp.value.model_copy(update={"steps": 2})
        found = values.optimise(self.slow, problems, [self.block], quick)
        few = ForgetRows(rows.keys[: n * len(rows.targets[0])], rows.targets[:n], tuple(range(n)))
        some = values.Values(found.change[:n], found.clean[:n], found.loss[:n], found.steps[:n])
        theirs, old = timed(
            self.slow.device,
            lambda: literal.insert(
                self.slow,
                LAYERS,
                few.keys,
                [r[0] for r in few.targets],
                some.clean[:, 0] + some.change[:, 0],
                self.second,
                self.hp.moments.weight,
            ),
        )
        with tempfile.TemporaryDirectory() as folder:
            second = {
                name: SiteMoment(len(moment), Workspace(Path(folder), {"site": name}), moment)
                for name, moment in self.second.items()
            }

            def ours(lm: Any, rows: ForgetRows, values: Values) -> tuple[float, Any]:
                request = ForgetRequest(tuple(facts[: len(rows.targets)]), (), (), ())
                flow = Flow(lm, request, self.hp, method, PastKeys(), Workspace(None, {}), None, Console(quiet=True))
                flow.solve(self.sites, rows, [], second, values)  # the inverses are then there
                return timed(lm.device, lambda: flow.solve(self.sites, rows, [], second, values))

            _, (in_float32, _) = ours(self.slow, few, some)
            spent, _ = ours(self.fast, few, some)
            of_all, _ = ours(self.fast, rows, found)
        exact = {name: left.double() @ right.double() for name, (left, right) in in_float32.items()}
        self.note(
            "insertion",
            theirs,
            spent,
            f"s, {n} facts",
            update_apart_in_float32=max(apart(exact[name], old[name]) for name in old),
        )
        self.end_to_end(theirs / n, of_all)

    def end_to_end(self, literal_insertion: float, insertion: float) -> None:
        """Values and insertion of all facts; the literal side is put together from its seconds for one fact."""
        if "values" not in self.found:
            return
        n, per_step = self.args.facts, self.found["values"]
        theirs = n * (per_step["literal"] * self.args.steps + literal_insertion)
        ours = n * per_step["ours"] * self.args.steps + insertion
        self.note("end_to_end", theirs, ours, f"s, {n} facts, statistics given")


@contextmanager
def small_vocabulary(lm: LM, size: int) -> Iterator[None]:
    """Inside, the output head knows the first ``size`` words only; what goes into the model stays as it was."""
    whole = lm.head
    small = torch.nn.Linear(whole.weight.shape[1], size, bias=False)  # type: ignore[index]
    small.weight = torch.nn.Parameter(whole.weight.detach()[:size].clone(), requires_grad=False)  # type: ignore[index]
    lm.model.set_output_embeddings(small)
    try:
        yield
    finally:
        lm.model.set_output_embeddings(whole)


def main() -> None:
    """Run the stages."""
    from editunlearn.lm.attention import short_rows
    from editunlearn.lm.hooks import frozen
    from editunlearn.lm.loading import load
    from editunlearn.pipeline import environment

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    p.add_argument("--facts", type=int, default=50)
    p.add_argument("--steps", type=int, default=25)
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
    with frozen(bench.slow.model), frozen(bench.fast.model), short_rows(bench.fast.device):
        for stage in ("machine", *args.stages):
            getattr(bench, stage)()
    if args.out:
        command = "OMP_NUM_THREADS=1 " + shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])
        atomic_write_json(args.out, {"command": command, "environment": dict(environment()), "stages": bench.found})
        atomic_write_text(args.out.with_suffix(".md"), table(command, dict(environment()), bench.found))


if __name__ == "__main__":
    main()
