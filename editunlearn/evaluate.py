"""Measure models and deltas with benchmarks: ``python -m editunlearn.evaluate --delta runs/memit --suite facts``."""

from __future__ import annotations

import argparse
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
    check_writable,
    parser,
    run_command,
)
from editunlearn.errors import GateError, InputError

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.evaluation.gates import Gate
    from editunlearn.evaluation.reference import Other
    from editunlearn.evaluation.states import State
    from editunlearn.evaluation.suites import Module, Source
    from editunlearn.evaluation.treatments import Treatment
    from editunlearn.facts.records import Fact

EXAMPLES = """\
  editunlearn evaluate --model demo --delta runs/memit --base --suite facts --facts forget.jsonl --retain keep.jsonl
  editunlearn evaluate --delta runs/memit --suite facts:attacks --facts forget.jsonl --under int4
  editunlearn evaluate --delta runs/memit --suite facts --facts forget.jsonl --require "leak_gen<=0.02"
  editunlearn evaluate --model my/model --suite tofu:forget10 --reference retrained/results.json
  editunlearn evaluate --delta runs/a --delta runs/b --suite "rwku:Stephen King,Tom Clancy" --limit 50"""


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("evaluate", __doc__ or "", EXAMPLES)
    p.add_argument("--suite", action="append", required=True, help="benchmark, NAME or NAME:WHICH; repeat for several")
    p.add_argument("--delta", type=Path, action="append", default=[], metavar="DIR", help="a saved edit; repeatable")
    p.add_argument("--base", action="store_true", help="measure the model without a delta, too")
    p.add_argument(
        "--under",
        action="append",
        default=[],
        metavar="TREATMENT",
        help="also after this was done to it: bf16, int8, int4, nf4, subspace:DIRECTIONS, relearn, "
        "relearn-lora or relearn-retain[:STEPS[:LEARNING_RATE[:SEED]]]",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of relearning, of sampling and of what attacks draw (default: 0)"
    )
    p.add_argument("--facts", help="what was to be forgotten, for the suite facts")
    p.add_argument("--retain", help="what was to be kept, for the suite facts")
    p.add_argument("--unknown", metavar="FILE", help="facts the model never knew: what relearning is compared with")
    p.add_argument("--targets", help="what the edit was to say instead, as for apply")
    p.add_argument("--data-root", type=Path, help="folder with local copies of hub datasets")
    p.add_argument("--limit", type=int, help="of each part, only the first so many items")
    p.add_argument("--reference", type=Path, help="results of a model that was never trained on the forget set")
    p.add_argument("--baseline", type=Path, help="results to be shown beside these, also open-unlearning's")
    p.add_argument("--require", action="append", default=[], metavar='"METRIC<=X"', help="exit with 3 if it is not so")
    p.add_argument(
        "--out", type=Path, default=Path("runs/evaluate"), help="folder for results (default: runs/evaluate)"
    )
    p.add_argument("--no-text", action="store_true", help="of the suite facts keep numbers only, no text")
    p.add_argument("--fresh", action="store_true", help="measure again what is there already")
    add_model_flags(p, None, "the one that the first delta was made on, or demo")
    add_run_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


@dataclass(frozen=True)
class Plan:
    """What the flags ask for, checked.

    Attributes:
        suites: name -> its file and its data.
        states: to be measured.
        gates: that must be met.
        references: by suite, results of a model that never knew.
        baselines: by suite, results to show beside.
        notes: what is left out.
        source: with the facts, which some treatments train on.
    """

    suites: dict[str, tuple[Module, Any]]
    states: list[State]
    gates: list[Gate]
    references: dict[str, Other]
    baselines: dict[str, Other]
    notes: list[str]
    source: Source


def plan(args: argparse.Namespace) -> Plan:
    """Check everything that can be checked without weights.

    Raises:
        InputError: everything that is wrong.
    """
    from editunlearn.evaluation import gates, suites
    from editunlearn.evaluation.reference import load_others
    from editunlearn.evaluation.states import states
    from editunlearn.evaluation.suites import is_facts
    from editunlearn.evaluation.treatments import parse

    checks = Checks()
    deltas = _deltas(args, checks)
    treatments = [t for text in args.under if (t := checks.run(lambda text=text: parse(text, args.seed)))]  # type: ignore[misc]
    facts = checks.run(lambda: _facts(args, deltas, treatments))  # None: they are bad, which has been said
    source = suites.Source(args.data_root, args.limit, *(facts or ((), ())))
    for flag, value, least in (("--limit", args.limit, 1), ("--seed", args.seed, 0)):
        if value is not None and value < least:
            checks.problems.append(f"{flag} {value}: at least {least}.")
    found: dict[str, tuple[Module, Any]] = {}
    for name in args.suite:
        found_module = checks.run(lambda name=name: suites.module(name))  # type: ignore[misc]
        if found_module is not None and (facts is not None or not is_facts(name)):
            file, which = found_module
            data = checks.run(lambda file=file, which=which: file.read(which, source))  # type: ignore[misc]
            found[name] = (file, data)
    names = [folder.resolve().name for folder in args.delta]
    unknown = (checks.run(lambda: _unknown(args, source.facts, treatments)) if args.unknown else None) or []
    measured, left_out = checks.run(
        lambda: states(list(zip(names, deltas, strict=False)), treatments, base=args.base, unknown=unknown)
    ) or ([], [])
    ours = not any(suite.startswith("lm-eval") for suite in args.suite)
    wanted = [checks.run(lambda text=text: gates.parse(text, ours=ours)) for text in args.require]  # type: ignore[misc]
    references, baselines = (
        (checks.run(lambda p=path, f=flag: load_others(p, args.suite, f)) if path else None) or {}  # type: ignore[misc]
        for flag, path in (("--reference", args.reference), ("--baseline", args.baseline))
    )
    if args.model is None:
        made_on = deltas[0].manifest.base if deltas else None
        args.model, args.revision = (made_on.name, made_on.revision) if made_on else ("demo", args.revision)
    checks.run(lambda: check_model(args, [delta.manifest for delta in deltas]))
    checks.run(lambda: check_writable(args.out, "--out"))
    checks.finish()
    return Plan(
        found, measured, [gate for gate in wanted if gate], references, baselines, [*source.notes, *left_out], source
    )


def _facts(args: argparse.Namespace, deltas: Sequence[Delta], treatments: Sequence[Treatment]) -> tuple[Any, Any]:
    """Facts with the targets that the first edit was made with, and retain facts."""
    from editunlearn.evaluation.suites import is_facts
    from editunlearn.facts.readers import load_facts
    from editunlearn.facts.targets import DEFAULT_TARGETS, asked_with, fill_targets

    for treatment in treatments:
        missing = [name for name in treatment.needs if getattr(args, name) is None]
        if missing:
            raise InputError(f"--under {treatment} trains on facts: give --{missing[0]} FILE.")
    needed = any(map(is_facts, args.suite)) or any(treatment.needs for treatment in treatments)
    if args.facts is None or not needed:
        return (), ()
    facts = load_facts(args.facts, data_root=args.data_root)
    halved = next((treatment for treatment in treatments if treatment.halves), None)
    if halved is not None and len(facts[: args.limit]) < 2:
        raise InputError(
            f"--under {halved} shows the model half of the facts and asks the others: of {args.facts} "
            + ("1 is taken (--limit 1)" if len(facts) > 1 else "there is 1")
            + ", at least 2 are needed."
        )
    retain = load_facts(args.retain, data_root=args.data_root, conflicts="first") if args.retain else []
    made = deltas[0].manifest if deltas else None
    seed = int(made.hparams.get("seed", 0)) if made is not None else 0
    how = args.targets or (asked_with(made.target_strategy) if made is not None else DEFAULT_TARGETS)
    return fill_targets(facts, how, seed=seed, pool=[*facts, *retain] if how == "random" else None), retain


def _unknown(args: argparse.Namespace, facts: Sequence[Fact], treatments: Sequence[Treatment]) -> list[Fact]:
    from editunlearn.evaluation.never_knew import load_unknown
    from editunlearn.evaluation.suites import is_facts

    if not any(map(is_facts, args.suite)):
        raise InputError(f"--unknown {args.unknown} is asked by the suite facts: give --suite facts as well.")
    return load_unknown(args.unknown, facts, treatments, data_root=args.data_root, limit=args.limit)


def _deltas(args: argparse.Namespace, checks: Checks) -> list[Delta]:
    from editunlearn.deltas.files import load

    found = [checks.run(lambda folder=folder: load(folder)) for folder in args.delta]  # type: ignore[misc]
    return [delta for delta in found if delta is not None]


def _main(args: argparse.Namespace, console: Console) -> None:
    made = plan(args)
    labels = ", ".join(state.label for state in made.states)
    console.info(f"suites: {', '.join(made.suites)}; measured: {labels}; out: {args.out}")
    for note in made.notes:
        console.info(f"note: {note}")
    if args.dry_run:
        console.info("Nothing was measured.")
        console.result_json({"suites": list(made.suites), "states": [state.label for state in made.states]})
        return
    from editunlearn.lm.processes import joined
    from editunlearn.measuring import measure

    with joined() as here:
        found = measure(args, made, console, here)
    if not here.first:
        return
    _show(found, made, console)
    reference = {state.label for state in made.states if state.unknown}  # of it nothing is required
    judged = {suite: {k: v for k, v in by.items() if k not in reference} for suite, by in found.items()}
    failed = [line for gate in made.gates for line in gate.failures(judged)]
    if failed:
        raise GateError(failed)


def _show(found: dict[str, dict[str, Any]], made: Plan, console: Console) -> None:
    for suite, by_label in found.items():
        columns = {label: results["summary"] for label, results in by_label.items()}
        if suite in made.baselines:
            columns = {"baseline": made.baselines[suite].about["summary"], **columns}
        names = list(dict.fromkeys(name for summary in columns.values() for name in summary))
        rows = [[name, *(_cell(summary.get(name)) for summary in columns.values())] for name in names]
        console.table(suite, ["metric", *columns], rows)
        notes: dict[str, dict[str, None]] = {}
        for name, value in ((n, v) for summary in columns.values() for n, v in summary.items() if v["reason"]):
            notes.setdefault(value["reason"], {})[name] = None
        for reason, of in notes.items():
            console.result(f"{', '.join(of)}: {reason}")
    console.result_json({suite: {label: r["summary"] for label, r in by.items()} for suite, by in found.items()})


def _cell(value: dict[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    shown = f"{value['value']:.4g}"
    return shown if value["low"] is None else f"{shown} [{value['low']:.3g}, {value['high']:.3g}]"


if __name__ == "__main__":
    sys.exit(main())
