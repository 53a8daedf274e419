"""What ``compare`` shows and writes: the plan of a dry run, and at the end tables, files, what to do next."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from editunlearn import estimate
from editunlearn.artifacts import atomic_write_together, json_bytes
from editunlearn.comparing import outputs
from editunlearn.comparing.asking import beside
from editunlearn.comparing.queue import Cell
from editunlearn.comparing.retraining import PASSAGE, per_token
from editunlearn.comparing.sweep import setting, strength
from editunlearn.evaluation.states import BASE

if TYPE_CHECKING:
    from editunlearn.comparing.planning import Plan
    from editunlearn.comparing.queue import Queue
    from editunlearn.comparing.schedule import Runs
    from editunlearn.console import Console


def dry_run(made: Plan, console: Console) -> None:
    """Every method with its trials, and the work of an edit from the configuration alone."""
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


def show(
    args: argparse.Namespace, made: Plan, queue: Queue, bare: dict[str, Any], found: list[Runs], console: Console
) -> None:
    """Tables, files, what to know, what to do next."""
    anew = per_token(made.config, PASSAGE).trained * args.trained_on if args.trained_on else None
    chosen, level = (outputs.rows(found, bare, matched=matched) for matched in (False, True))
    tables = {
        "chosen on the validation half, measured on the test half": outputs.table(chosen),
        f"matched: keeps most among the trials that leak at most {args.match:g}": outputs.table(level),
        **outputs.others(chosen, list(made.suites), [str(under) for under in made.treatments]),
        "cost of an edit": outputs.costs(found, anew),
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
    for suite in made.suites:
        said = bare[BASE].get(beside(suite, "forget_quality")) or {}
        notes += [f"{suite}, forget quality: {said['reason']}."] if said.get("reason") else []
    without = [runs.arm.name for runs in found if runs.matched is None]
    if without:
        notes.append(f"No trial leaks at most {args.match:g}: {', '.join(without)}.")
    if anew is not None:
        notes.append(
            f"Training anew on {args.trained_on:g} tokens in passages of {PASSAGE:,}: {anew:.3g} FLOPs, counted."
        )
    for note in notes:
        console.info(note)
    svg = outputs.pareto(found, chosen)
    if svg is None:
        console.warn('no plots: pip install "editunlearn[report]" for matplotlib')
    result = outputs.document(
        {
            **made.request,
            "trials": args.trials,
            "seeds": args.seeds,
            "match": args.match,
            "trained_on": args.trained_on,
        },
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
        where = queue.folder(Cell(best.arm, best.chosen))
        console.next_step(["editunlearn", "export", "--delta", str(where), "--to", "merged", "--out", "merged"])
