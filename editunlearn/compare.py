"""Compare methods on equal terms: ``python -m editunlearn.compare --facts F --retain R --methods memit,npo,grin``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from editunlearn.cli import (
    add_model_flags,
    add_offload_flag,
    add_run_flags,
    load_model,
    parser,
    run_command,
)
from editunlearn.facts.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    from editunlearn.comparing.planning import Plan
    from editunlearn.comparing.queue import Queue
    from editunlearn.console import Console
    from editunlearn.facts.records import Fact
    from editunlearn.lm.processes import Processes

EXAMPLES = """\
  editunlearn compare --facts forget.jsonl --retain keep.jsonl --methods memit,npo,grin --out runs/c
  editunlearn compare --facts forget.jsonl --retain keep.jsonl --methods memit,alphaedit,ga --trials 3 --seeds 3
  editunlearn compare --facts forget.jsonl --retain keep.jsonl --methods memit,mine.yaml --budget wall:600
  editunlearn compare --model runs/taught --reference runs/never-knew --facts forget.jsonl --retain keep.jsonl \\
    --methods memit,npo --suite quick --suite tofu:forget10 --under int4 --under relearn:5"""


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("compare", __doc__ or "", EXAMPLES)
    p.add_argument(
        "--methods", required=True, help="comma-separated: shipped hparams (memit, paper/memit, npo, ...) or files"
    )
    p.add_argument("--facts", required=True, help="facts to forget: a file or a hub id, as for apply")
    p.add_argument("--retain", required=True, help="facts that must stay; every method gets all of them")
    p.add_argument("--targets", default=DEFAULT_TARGETS, help=f"as for apply (default: {DEFAULT_TARGETS})")
    p.add_argument("--data-root", type=Path, help="folder with local copies of hub datasets")
    p.add_argument("--limit", type=int, help="only the first N facts")
    group = p.add_argument_group("terms")
    group.add_argument(
        "--suite",
        action="append",
        help="what is measured: quick (the suite facts; default), facts:attacks, or others of evaluate; repeatable",
    )
    group.add_argument(
        "--trials", type=int, default=1, help="settings that each method tries, the same number for all (default: 1)"
    )
    group.add_argument("--seeds", type=int, default=1, help="seeds of what is shown (default: 1)")
    group.add_argument(
        "--budget",
        default="none",
        metavar="KIND:AMOUNT",
        help="what each edit may take: wall:SECONDS or flops:N; one that takes more has failed (default: none)",
    )
    group.add_argument(
        "--match",
        type=float,
        default=0.05,
        metavar="LEAK",
        help="the matched view shows of each method the trial that keeps most among those that leak so little (0.05)",
    )
    group.add_argument(
        "--under",
        action="append",
        default=[],
        metavar="TREATMENT",
        help="ask what is shown once more after this was done to it, as for evaluate: int4, relearn:5, ...; repeatable",
    )
    group.add_argument(
        "--reference",
        metavar="MODEL|RESULTS",
        help="a model that never knew (finetune --without), which is asked the same and held against every run; or "
        "results of one by evaluate, for suites that compare with it",
    )
    group.add_argument(
        "--trained-on",
        type=float,
        metavar="TOKENS",
        help="what the model was trained on, such as 6e12: the cost table then says how much less an edit takes",
    )
    group = p.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    group.add_argument("--retry", action="store_true", help="run again what has failed")
    group.add_argument("--fresh", action="store_true", help="throw away what --out has and start over")
    add_model_flags(p)
    add_offload_flag(p)
    add_run_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    from editunlearn.comparing import planning, schedule, showing
    from editunlearn.lm.processes import joined

    made = planning.plan(args, console)
    least = len(made.arms) * (args.trials - 1 + args.seeds)
    console.header(
        [
            f"methods: {', '.join(arm.name for arm in made.arms)} on {args.model}; out: {args.out}",
            f"{len(made.facts)} facts to forget, {len(made.retain)} to keep; {args.trials} trials, {args.seeds} seeds; "
            f"budget of an edit: {made.budget}; at least {least} edits",
        ]
    )
    if args.dry_run:
        showing.dry_run(made, console)
        return
    with joined() as here:
        if args.fresh:
            here.by_first(lambda: planning.clear(args.out))
        queue = _queue(args, made, here, console)
        bare, found = schedule.run(queue, made.arms, here, console)
    if here.first:
        showing.show(args, made, queue, bare, found, console)


def _queue(args: argparse.Namespace, made: Plan, among: Processes, console: Console) -> Queue:
    """The model loaded, the halves made, what the runs depend on collected; what is made for all, the first makes."""
    from editunlearn import __version__
    from editunlearn.artifacts import atomic_write_json
    from editunlearn.comparing import gold
    from editunlearn.comparing.asking import Asking, requests
    from editunlearn.comparing.planning import REQUEST
    from editunlearn.comparing.queue import Queue
    from editunlearn.console import Console
    from editunlearn.editors.moments import tokenizer_hash
    from editunlearn.facts.records import content_hash
    from editunlearn.facts.text import documents
    from editunlearn.general import general_facts, without
    from editunlearn.lm.fingerprint import model_fingerprint
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.pipeline import environment, with_targets

    lm = load_model(args)
    cache = args.cache_dir or default_cache_dir()

    def prepared() -> tuple[list[Fact], list[Fact], Sequence[Fact]]:
        facts = with_targets(lm, made.facts, args.targets, seed=0, retain=made.retain, cache=cache, console=console)
        atomic_write_json(args.out / REQUEST, made.request)
        kept = without(made.retain, facts)
        return facts, kept, general_facts(lm, facts, kept, cache, console).heldout

    facts, kept, heldout = among.by_first(prepared)
    if not heldout and not any(fact.neighbors for fact in facts):
        console.warn("no held-out facts, no neighbours: what is kept is read off the retain facts, which methods saw")
    attacks = made.facts_suite[0].endswith(":attacks")
    halves = requests(facts, kept, heldout, list(documents("general", "heldout")), attacks=attacks)
    versions = dict(environment())
    inputs = {
        "editunlearn": __version__,
        "weights": model_fingerprint(lm),
        "tokenizer": tokenizer_hash(lm),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "facts": content_hash(facts),
        "retain": content_hash(made.retain),
        "suite": made.request["suite"],
        "budget": str(made.budget),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
    }
    model = Path(lm.name).name if Path(lm.name).is_absolute() else lm.name
    about = {**inputs, "model": model, "environment": versions, "taught": content_hash([])}
    inner = console if args.verbose else Console(quiet=True, silent=not among.first)
    asking = Asking(lm, halves, made.suites, made.facts_suite, about, inner, made.treatments)
    never = None
    if (reference := made.reference) is not None:
        console.info(f"the reference: {args.reference}")
        never = among.by_first(lambda: gold.measured(reference, asking, args.out))
        inputs["reference"] = never.sha
        asking = replace(asking, references=never.measured, about={**about, "reference": never.sha})
    return Queue(
        lm=lm,
        out=args.out,
        facts=facts,
        retain=made.retain,
        how=made.how,
        asking=asking,
        never=never.summary if never is not None else None,
        budget=made.budget,
        seeds=args.seeds,
        level=args.match,
        inputs=inputs,
        cache=cache,
        console=inner,
        retry=args.retry,
    )


if __name__ == "__main__":
    sys.exit(main())
