"""Measure models and deltas with benchmarks: ``python -m editunlearn.evaluate --delta runs/memit --suite facts``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import (
    Checks,
    add_model_flags,
    add_run_flags,
    check_model,
    check_writable,
    console_of,
    load_model,
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
    from editunlearn.evaluation.suites import Module, Part, Source
    from editunlearn.evaluation.treatments import Treatment
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

EXAMPLES = """\
  editunlearn evaluate --model demo --delta runs/memit --base --suite facts --facts forget.jsonl --retain keep.jsonl
  editunlearn evaluate --delta runs/memit --suite facts:attacks --facts forget.jsonl --under int4
  editunlearn evaluate --delta runs/memit --suite facts --facts forget.jsonl --require "leak_gen<=0.02"
  editunlearn evaluate --model my/model --suite tofu:forget10 --reference retrained/results.json
  editunlearn evaluate --delta runs/a --delta runs/b --suite "rwku:Stephen King,Tom Clancy" --limit 50"""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags."""
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
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(_main, argv)


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
    from editunlearn.evaluation.treatments import parse

    checks = Checks()
    deltas = _deltas(args, checks)
    treatments = [t for text in args.under if (t := checks.run(lambda text=text: parse(text, args.seed)))]  # type: ignore[misc]
    facts = checks.run(lambda: _facts(args, deltas, treatments))  # None: they are bad, which has been said
    source = suites.Source(args.data_root, args.limit, *(facts or ((), ())))
    if args.limit is not None and args.limit < 1:
        checks.run(lambda: _refuse(f"--limit {args.limit}: at least 1."))
    found: dict[str, tuple[Module, Any]] = {}
    for name in args.suite:
        found_module = checks.run(lambda name=name: suites.module(name))  # type: ignore[misc]
        if found_module is not None and (facts is not None or not _is_facts(name)):
            file, which = found_module
            data = checks.run(lambda file=file, which=which: file.read(which, source))  # type: ignore[misc]
            found[name] = (file, data)
    names = [folder.resolve().name for folder in args.delta]
    unknown = (checks.run(lambda: _unknown(args, source.facts, treatments)) if args.unknown else None) or []
    measured, left_out = checks.run(
        lambda: states(list(zip(names, deltas, strict=False)), treatments, base=args.base, unknown=unknown)
    ) or ([], [])
    wanted = [checks.run(lambda text=text: gates.parse(text)) for text in args.require]  # type: ignore[misc]
    references, baselines = (
        (checks.run(lambda p=path, f=flag: load_others(p, args.suite, f)) if path else None) or {}  # type: ignore[misc]
        for flag, path in (("--reference", args.reference), ("--baseline", args.baseline))
    )
    if args.model is None:
        made_on = deltas[0].manifest.base if deltas else None
        args.model, args.revision = (made_on.name, made_on.revision) if made_on else ("demo", args.revision)
    checks.run(lambda: check_model(args))
    checks.run(lambda: check_writable(args.out, "--out"))
    checks.finish()
    return Plan(
        found, measured, [gate for gate in wanted if gate], references, baselines, [*source.notes, *left_out], source
    )


def _refuse(message: str) -> None:
    raise InputError(message)


def _is_facts(suite: str) -> bool:
    return suite.partition(":")[0] == "facts"


def _facts(args: argparse.Namespace, deltas: Sequence[Delta], treatments: Sequence[Treatment]) -> tuple[Any, Any]:
    """Facts with the targets that the first edit was made with, and retain facts."""
    from editunlearn.facts.readers import load_facts
    from editunlearn.facts.targets import DEFAULT_TARGETS, asked_with, fill_targets

    for treatment in treatments:
        missing = [name for name in treatment.needs if getattr(args, name) is None]
        if missing:
            raise InputError(f"--under {treatment} trains on facts: give --{missing[0]} FILE.")
    needed = any(map(_is_facts, args.suite)) or any(treatment.needs for treatment in treatments)
    if args.facts is None or not needed:
        return (), ()
    facts = load_facts(args.facts, data_root=args.data_root)
    retain = load_facts(args.retain, data_root=args.data_root, conflicts="first") if args.retain else []
    made = deltas[0].manifest if deltas else None
    seed = int(made.hparams.get("seed", 0)) if made is not None else 0
    how = args.targets or (asked_with(made.target_strategy) if made is not None else DEFAULT_TARGETS)
    return fill_targets(facts, how, seed=seed, pool=[*facts, *retain] if how == "random" else None), retain


def _unknown(args: argparse.Namespace, facts: Sequence[Fact], treatments: Sequence[Treatment]) -> list[Fact]:
    from editunlearn.evaluation.never_knew import load_unknown

    if not any(map(_is_facts, args.suite)):
        raise InputError(f"--unknown {args.unknown} is asked by the suite facts: give --suite facts as well.")
    return load_unknown(args.unknown, facts, treatments, data_root=args.data_root, limit=args.limit)


def _deltas(args: argparse.Namespace, checks: Checks) -> list[Delta]:
    from editunlearn.deltas.files import load

    found = [checks.run(lambda folder=folder: load(folder)) for folder in args.delta]  # type: ignore[misc]
    return [delta for delta in found if delta is not None]


def _main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    args.command = shlex.join(["editunlearn", "evaluate", *argv])
    console = console_of(args)
    made = plan(args)
    labels = ", ".join(state.label for state in made.states)
    console.info(f"suites: {', '.join(made.suites)}; measured: {labels}; out: {args.out}")
    for note in made.notes:
        console.info(f"note: {note}")
    if args.dry_run:
        console.info("Nothing was measured.")
        console.result_json({"suites": list(made.suites), "states": [state.label for state in made.states]})
        return
    found = measure(args, made, console)
    _show(found, made, console)
    reference = {state.label for state in made.states if state.unknown}  # of it nothing is required
    judged = {suite: {k: v for k, v in by.items() if k not in reference} for suite, by in found.items()}
    failed = [line for gate in made.gates for line in gate.failures(judged)]
    if failed:
        raise GateError(failed)


def measure(args: argparse.Namespace, made: Plan, console: Console) -> dict[str, dict[str, Any]]:
    """Measure every suite in every state: suite -> label -> what its results file holds."""
    from editunlearn.deltas.files import check_base
    from editunlearn.evaluation import results
    from editunlearn.evaluation.running import Run
    from editunlearn.evaluation.states import slug
    from editunlearn.lm.fingerprint import model_fingerprint

    lm = load_model(args)
    for state in made.states:
        if state.delta is not None:
            check_base(state.delta, lm)
    asked = _asked(lm, made, args, console)
    _check_alike(asked, made)
    found: dict[str, dict[str, Any]] = {name: {} for name in made.suites}
    weights = model_fingerprint(lm)  # before anything is applied
    parts = [part for of_suite in asked.values() for parts in of_suite.values() for part in parts]
    with console.progress(sum(part.looks_before for part in parts), "before anything is applied") as bar:
        for part in parts:
            part.prepare(lm, bar.update)
    facts, retain = (of[: args.limit] for of in (made.source.facts, made.source.retain))
    for state in made.states:
        with state.on(lm, facts, retain, console):
            for name, (file, _) in made.suites.items():
                if state.unknown and not _is_facts(name):
                    continue
                place = args.out / state.label / slug(name) / results.FILE
                about = _about(args, lm, weights, name, state, state.taught(facts, retain))
                reference = made.references[name].measured if name in made.references else None
                run = Run(place, about, reference, args.fresh, args.no_text and _is_facts(name))
                found[name][state.label] = run.measure(lm, file, asked[name][_which(state)], console)
                if name.startswith("tofu"):
                    _write_open_unlearning(place)
    return found


def _check_alike(asked: Mapping[str, Mapping[Which, Sequence[Part]]], made: Plan) -> None:
    """Raise InputError where a reference or a baseline was asked something else; nothing has been measured yet."""
    from editunlearn.evaluation.results import check_alike
    from editunlearn.evaluation.running import asked as data_of

    for flag, others in (("--reference", made.references), ("--baseline", made.baselines)):
        for suite, other in others.items():
            check_alike(data_of(asked[suite][False, False]), other.measured, flag)


Which = tuple[bool, bool]
"""Whether only half of the facts are asked, and whether facts that the model never knew are."""


def _which(state: State) -> Which:
    return state.halves, bool(state.unknown)


def _asked(lm: LM, made: Plan, args: argparse.Namespace, console: Console) -> dict[str, dict[Which, list[Part]]]:
    """Parts of each suite: of all facts, of those that relearning does not show, of facts that were never known."""
    from editunlearn.evaluation.never_knew import asked_part
    from editunlearn.evaluation.suites.facts import TAUGHT, UNKNOWN
    from editunlearn.evaluation.treatments import halves

    found: dict[str, dict[Which, list[Part]]] = {}
    for name, (file, data) in made.suites.items():
        whole = _completed(lm, data, args, console)
        found[name] = {(False, False): file.parts(lm, whole)}
        if any(state.halves for state in made.states):
            if _is_facts(name):
                shown, others = halves(whole.facts)
                parts = [*file.parts(lm, replace(whole, facts=others)), asked_part(lm, TAUGHT, shown)]
            else:
                parts = file.parts(lm, whole)
            found[name][True, False] = parts
        for state in (s for s in made.states if s.unknown and _is_facts(name)):
            left = halves(state.unknown)[1] if state.halves else state.unknown
            found[name][_which(state)] = [asked_part(lm, UNKNOWN, left)]
    return found


def _write_open_unlearning(place: Path) -> None:
    """Beside the results the file that open-unlearning would have written."""
    from editunlearn.artifacts import atomic_write_json
    from editunlearn.evaluation import open_unlearning, results

    about, measured = results.load(place)
    totals = {name: results.Value(**value) for name, value in about["summary"].items()}
    atomic_write_json(place.with_name(open_unlearning.EVAL_FILE), open_unlearning.to_open_unlearning(measured, totals))


def _completed(lm: LM, data: Any, args: argparse.Namespace, console: Console) -> Any:
    """For the suite facts: known facts that no edit saw, and the text for the perplexity."""
    from editunlearn.evaluation.suites.facts import Request
    from editunlearn.facts.text import documents
    from editunlearn.general import general_facts, without
    from editunlearn.lm.loading import default_cache_dir

    if not isinstance(data, Request):
        return data
    kept = without(data.all_retain, data.all_facts)
    general = general_facts(lm, data.all_facts, kept, args.cache_dir or default_cache_dir(), console)
    return replace(
        data,
        heldout=general.heldout[: args.limit],
        text=list(documents("general", "heldout"))[: args.limit],
        seed=args.seed,
    )


def _about(
    args: argparse.Namespace, lm: LM, weights: str, suite: str, state: State, taught: Sequence[Fact]
) -> dict[str, Any]:
    from editunlearn import __version__
    from editunlearn.editors.moments import tokenizer_hash
    from editunlearn.facts.records import content_hash
    from editunlearn.pipeline import environment
    from editunlearn.workspace import key_of

    delta = state.delta.manifest if state.delta is not None else None
    versions = dict(environment())
    depends = {
        "suite": suite,
        "weights": weights,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "delta": delta.tensors_sha256 if delta else None,
        "under": str(state.under) if state.under else None,
    }
    more = {
        "version": __version__,
        "tokenizer": tokenizer_hash(lm),
        "torch": versions["torch"],
        "taught": content_hash(taught),
    }
    key = key_of({**depends, **more, "transformers": versions["transformers"]})
    about = {
        "label": state.label,
        "model": Path(lm.name).name if Path(lm.name).is_absolute() else lm.name,
        "method": delta.method if delta else None,
        "limit": args.limit,
        "key": key,
        "command": args.command,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": versions,
    }
    return {**depends, **about}


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
