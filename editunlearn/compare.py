"""Compare methods on equal terms: ``python -m editunlearn.compare --facts F --retain R --methods memit,npo,grin``."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import (
    Checks,
    add_model_flags,
    add_run_flags,
    check_model,
    check_settings,
    check_writable,
    load_model,
    model_terms,
    parser,
    read_facts,
    run_command,
)
from editunlearn.errors import InputError
from editunlearn.facts.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    from editunlearn.comparing.meter import Budget
    from editunlearn.comparing.queue import Queue, Runs
    from editunlearn.comparing.sweep import Arm
    from editunlearn.console import Console
    from editunlearn.evaluation.suites import Module
    from editunlearn.facts.records import Fact

EXAMPLES = """\
  editunlearn compare --facts forget.jsonl --retain keep.jsonl --methods memit,npo,grin --out runs/c
  editunlearn compare --facts forget.jsonl --retain keep.jsonl --methods memit,alphaedit,ga --trials 3 --seeds 3
  editunlearn compare --facts forget.jsonl --retain keep.jsonl --methods memit,mine.yaml --budget wall:600"""
REQUEST = "request.json"
"""What the runs of a folder have in common; methods, trials and seeds may become more."""


@dataclass(frozen=True)
class Plan:
    """What the flags ask for, checked.

    Attributes:
        facts: with targets. how: those came about.
        suites: other benchmarks, by name. facts_suite: the one that is asked in halves.
        request: what the runs of ``--out`` have in common.
    """

    arms: list[Arm]
    facts: list[Fact]
    retain: list[Fact]
    budget: Budget
    facts_suite: tuple[str, Module]
    suites: dict[str, tuple[Module, Any]]
    request: dict[str, Any]
    config: Any


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
    group = p.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    group.add_argument("--retry", action="store_true", help="run again what has failed")
    group.add_argument("--fresh", action="store_true", help="throw away what --out has and start over")
    add_model_flags(p)
    add_run_flags(p)
    return p


def plan(args: argparse.Namespace, console: Console) -> Plan:
    """Check all input; no weights are read.

    Raises:
        InputError: everything that is wrong.
    """
    from editunlearn.comparing import sweep
    from editunlearn.comparing.meter import Budget
    from editunlearn.facts.records import content_hash
    from editunlearn.facts.targets import fill_targets
    from editunlearn.lm.loading import default_cache_dir

    checks = Checks()
    config = checks.run(lambda: check_model(args))
    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    arms = checks.run(lambda: sweep.arms(names, args.trials, getattr(config, "model_type", None))) or []
    for arm in arms:
        checks.run(lambda arm=arm: check_settings(arm.trials[0], config))  # type: ignore[misc]
    budget = checks.run(lambda: Budget.parse(args.budget))
    for flag, value in (("--seeds", args.seeds), ("--limit", args.limit)):
        if value is not None and value < 1:
            checks.problems.append(f"{flag} {value}: at least 1.")
    if not 0 <= args.match <= 1:
        checks.problems.append(f"--match {args.match:g}: a rate of leaks, from 0 to 1.")
    limit = None if args.limit is None else max(1, args.limit)  # a bad one has been said
    given = checks.run(lambda: read_facts(args, args.facts, console, limit=limit))
    retain = checks.run(lambda: read_facts(args, args.retain, console, keep=True)) or []
    pool = [*(given or []), *retain] if args.targets == "random" else None
    facts = checks.run(lambda: fill_targets(given or [], args.targets, seed=0, pool=pool)) or []
    if facts:
        checks.run(lambda: _divisible(args, facts, retain))
    own, others = checks.run(lambda: _suites(args, facts, retain)) or (None, {})
    checks.run(lambda: check_writable(args.out, "--out"))
    checks.run(lambda: check_writable(args.cache_dir or default_cache_dir(), "--cache-dir"))
    request = {
        **model_terms(args),
        "facts": content_hash(given or []),
        "retain": content_hash(retain),
        "targets": args.targets,
        "suite": args.suite or ["quick"],
        "budget": str(budget),
    }
    if not args.fresh:
        checks.run(lambda: _check_out(args.out, request))
    checks.finish()
    assert budget is not None and own is not None  # noqa: S101 - finish() raised otherwise
    return Plan(arms, facts, retain, budget, own, others, request, config)


def _divisible(args: argparse.Namespace, facts: Sequence[Fact], retain: Sequence[Fact]) -> None:
    """There is something for both halves, and something to keep."""
    from editunlearn.comparing.asking import split
    from editunlearn.general import without

    problems = []
    if not all(split(facts).values()):
        problems.append(
            f"--facts {args.facts}: {len(facts)} fact; half of them choose settings and the others are reported, so "
            "that at least 2 are needed."
        )
    kept = without(retain, facts)
    if retain and (not kept or not all(split(kept).values())):
        problems.append(
            f"--retain {args.retain}: of its {len(retain)} facts {len(kept)} are not about a subject that is to be "
            "forgotten; at least 2 are needed, one for each half."
        )
    if problems:
        raise InputError(problems)


def _suites(
    args: argparse.Namespace, facts: Sequence[Fact], retain: Sequence[Fact]
) -> tuple[tuple[str, Module], dict[str, tuple[Module, Any]]]:
    """The suite that is asked in halves, and the others with their data."""
    from editunlearn.comparing.asking import QUICK, is_quick
    from editunlearn.evaluation import suites

    own = list(dict.fromkeys("facts" if name == QUICK else name for name in args.suite or [QUICK] if is_quick(name)))
    if len(own) > 1:
        raise InputError(f"--suite: {' and '.join(own)} ask the same facts; give one of them.")
    checks, source = Checks(), suites.Source(args.data_root, None, facts, retain)
    module, which = suites.module(own[0] if own else "facts")
    if facts:
        checks.run(lambda: module.read(which, source))
    others: dict[str, tuple[Module, Any]] = {}
    for name in (name for name in args.suite or [] if not is_quick(name)):
        found = checks.run(lambda name=name: suites.module(name))  # type: ignore[misc]
        if found is not None:
            others[name] = (found[0], checks.run(lambda f=found: f[0].read(f[1], source)))  # type: ignore[misc]
    checks.finish()
    return ((own or ["facts"])[0], module), others


def _check_out(out: Path, request: dict[str, Any]) -> None:
    """What is in ``--out`` is of the same request."""
    from editunlearn.artifacts import cached_json

    ways = "Choose another folder, or give --fresh to throw it away."
    there = cached_json(out / REQUEST, dict)
    if there is None:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"--out {out}: is not empty, and no comparison made it. Choose another folder.")
        return
    other = [name for name, value in request.items() if there.get(name) != value]
    if other:
        raise InputError(f"--out {out}: holds a comparison on other terms (other {', '.join(other)}). {ways}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    made = plan(args, console)
    least = len(made.arms) * (args.trials - 1 + args.seeds)
    console.header(
        [
            f"methods: {', '.join(arm.name for arm in made.arms)} on {args.model}; out: {args.out}",
            f"{len(made.facts)} facts to forget, {len(made.retain)} to keep; {args.trials} trials, {args.seeds} seeds; "
            f"budget of an edit: {made.budget}; at least {least} edits",
        ]
    )
    if args.dry_run:
        _dry_run(made, console)
        return
    if args.fresh:
        _clear(args.out)
    queue = _queue(args, made, console)
    base, found = _run(queue, made, console)
    _show(args, made, queue, base, found, console)


def _clear(out: Path) -> None:
    """Remove an earlier comparison, and nothing that is none.

    Raises:
        InputError: there is something else.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / REQUEST).is_file():
        raise InputError(f"--out {out}: is not empty, and no comparison made it. Choose another folder.")
    shutil.rmtree(out, ignore_errors=True)


def _dry_run(made: Plan, console: Console) -> None:
    """Every method with its trials, and the work of an edit from the configuration alone."""
    from editunlearn import estimate
    from editunlearn.comparing.sweep import setting, strength

    rows = []
    for arm in made.arms:
        hp = arm.trials[0]
        found = estimate.target(made.config, hp)
        work = estimate.work(estimate.cost(found.model), hp, made.facts, made.retain, found)
        once = ("general facts, once per model", "second moments, once per model", "measuring before and after")
        flops = sum(count for stage, count in work.items() if stage not in once)
        key = strength(hp)
        tried = ", ".join(f"{setting(trial, key):g}" for trial in arm.trials)
        rows.append([arm.name, key, tried, f"{flops / 1e12:,.3g} TFLOP"])
    console.table("methods", ["method", "what the trials change", "to", "an edit, at most"], rows)
    console.result_json({"methods": [arm.name for arm in made.arms], "request": made.request})
    console.info("Nothing was loaded or written.")
    console.next_step("the same command without --dry-run")


def _queue(args: argparse.Namespace, made: Plan, console: Console) -> Queue:
    """The model loaded, the halves made, what the runs depend on collected."""
    from editunlearn import __version__
    from editunlearn.artifacts import atomic_write_json
    from editunlearn.comparing.asking import Asking, requests
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
    facts = with_targets(lm, made.facts, args.targets, seed=0, retain=made.retain, cache=cache, console=console)
    atomic_write_json(args.out / REQUEST, made.request)
    kept = without(made.retain, facts)
    heldout = general_facts(lm, facts, kept, cache, console).heldout
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
    asking = Asking(lm, halves, made.suites, made.facts_suite, about, console)
    inner = console if args.verbose else Console(quiet=True)
    asking.console = inner
    return Queue(
        lm=lm,
        out=args.out,
        facts=facts,
        retain=made.retain,
        targets=args.targets,
        asking=asking,
        budget=made.budget,
        seeds=args.seeds,
        level=args.match,
        inputs=inputs,
        cache=cache,
        console=inner,
        retry=args.retry,
    )


def _run(queue: Queue, made: Plan, console: Console) -> tuple[dict[str, Any], list[Runs]]:
    """All of the queue, under one bar."""
    from editunlearn.comparing.asking import TEST

    console.info("the unedited model is asked first")
    base = dict(queue.base()[TEST])
    found: list[Runs] = []
    each = len(made.arms[0].trials) + queue.seeds
    with console.progress(each * len(made.arms), "runs") as bar:
        for number, arm in enumerate(made.arms):
            console.info(f"{arm.name}: method {number + 1} of {len(made.arms)}")
            done = [0]

            def tick(done: list[int] = done) -> None:
                done[0] += 1
                bar.update()

            found.append(queue.arm(arm, tick))
            bar.update(max(0, each - done[0]))  # a method of which nothing can be shown has no more runs
    return base, found


def _show(
    args: argparse.Namespace, made: Plan, queue: Queue, base: dict[str, Any], found: list[Runs], console: Console
) -> None:
    """Tables, files, what to know, what to do next."""
    from editunlearn.artifacts import atomic_write_together, json_bytes
    from editunlearn.comparing import outputs

    chosen, level = (outputs.rows(found, base, matched=matched) for matched in (False, True))
    tables = {
        "chosen on the validation half, measured on the test half": outputs.table(chosen),
        f"matched: keeps most among the trials that leak at most {args.match:g}": outputs.table(level),
        "cost of an edit": outputs.costs(found),
    }
    failed = outputs.failures(found)
    if failed:
        tables["failed"] = (["method", "run", "why"], failed)
    for title, (columns, cells) in tables.items():
        console.table(title, columns, cells)
    notes = [
        f"± is half of the 95% interval over {args.seeds} seeds; intervals over items are on the page."
        if args.seeds > 1
        else "One seed: no interval over seeds; intervals over items are on the page.",
        "FLOPs: matrix products, convolutions and attention kernels that torch counts, of the edit alone; what is made "
        "once for a model (second moments, known facts) is not in time, FLOPs or tokens.",
        "Tokens seen: all that entered the model while it was edited, padding included, once for each pass.",
    ]
    without = [runs.arm.name for runs in found if runs.matched is None]
    if without:
        notes.append(f"No trial leaks at most {args.match:g}: {', '.join(without)}.")
    for note in notes:
        console.info(note)
    svg = outputs.pareto(found, chosen)
    if svg is None:
        console.warn('no plots: pip install "editunlearn[report]" for matplotlib')
    result = outputs.document(
        {**made.request, "trials": args.trials, "seeds": args.seeds, "match": args.match},
        found,
        {"chosen": chosen, "matched": level},
    )
    files = {
        "comparison.json": json_bytes(result),
        "comparison.md": outputs.markdown(tables, notes).encode(),
        "report.html": outputs.html(queue, found, f"{len(made.facts)} facts, {len(found)} methods", svg).encode(),
        **({"pareto.svg": svg.encode()} if svg else {}),
    }
    atomic_write_together({args.out / name: data for name, data in files.items()})
    console.info(f"saved: {', '.join(files)} in {args.out}")
    console.result_json(result)
    best = next((runs for runs in found if runs.chosen is not None and (runs.chosen, 0) in runs.test), None)
    if best is not None and best.chosen is not None:
        where = queue.folder(best.arm, best.chosen, 0)
        console.next_step(["editunlearn", "export", "--delta", str(where), "--to", "merged", "--out", "merged"])


if __name__ == "__main__":
    sys.exit(main())
