"""What ``evaluate`` has planned, measured: every suite in every state, on one loaded model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import load_model

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.evaluate import Plan
    from editunlearn.evaluation.states import State
    from editunlearn.evaluation.suites import Part
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM
    from editunlearn.lm.processes import Processes


Which = tuple[bool, bool]
"""Whether only half of the facts are asked, and whether facts that the model never knew are."""


def measure(args: argparse.Namespace, made: Plan, console: Console, among: Processes) -> dict[str, dict[str, Any]]:
    """Measure every suite in every state: suite -> label -> what its results file holds.

    Args:
        among: processes that share the items; each gets all results.
    """
    from editunlearn.deltas.files import check_base
    from editunlearn.evaluation import results
    from editunlearn.evaluation.running import Run
    from editunlearn.evaluation.states import slug
    from editunlearn.evaluation.suites import is_facts
    from editunlearn.lm.fingerprint import model_fingerprint

    lm = load_model(args)
    lm.among = among
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
                if state.unknown and not is_facts(name):
                    continue
                place = args.out / state.label / slug(name) / results.FILE
                about = _about(args, lm, weights, name, state, state.taught(facts, retain))
                reference = made.references[name].measured if name in made.references else None
                run = Run(place, about, reference, args.fresh, args.no_text and is_facts(name))
                found[name][state.label] = run.measure(lm, file, asked[name][_which(state)], console)
                if name.startswith("tofu") and among.first:
                    _write_open_unlearning(place)
    return found


def _check_alike(asked: Mapping[str, Mapping[Which, Sequence[Part]]], made: Plan) -> None:
    """Raise InputError where a reference or a baseline was asked something else; nothing has been measured yet."""
    from editunlearn.evaluation.results import check_alike
    from editunlearn.evaluation.running import asked as data_of

    for flag, others in (("--reference", made.references), ("--baseline", made.baselines)):
        for suite, other in others.items():
            check_alike(data_of(asked[suite][False, False]), other.measured, flag)


def _which(state: State) -> Which:
    return state.halves, bool(state.unknown)


def _asked(lm: LM, made: Plan, args: argparse.Namespace, console: Console) -> dict[str, dict[Which, list[Part]]]:
    """Parts of each suite: of all facts, of those that relearning does not show, of facts that were never known."""
    from editunlearn.evaluation.never_knew import asked_part
    from editunlearn.evaluation.suites import is_facts
    from editunlearn.evaluation.suites.facts import TAUGHT, UNKNOWN
    from editunlearn.evaluation.treatments import halves

    found: dict[str, dict[Which, list[Part]]] = {}
    for name, (file, data) in made.suites.items():
        whole = _completed(lm, data, args, console)
        found[name] = {(False, False): file.parts(lm, whole)}
        if any(state.halves for state in made.states):
            if is_facts(name):
                shown, others = halves(whole.facts)
                parts = [*file.parts(lm, replace(whole, facts=others)), asked_part(lm, TAUGHT, shown)]
            else:
                parts = file.parts(lm, whole)
            found[name][True, False] = parts
        for state in (s for s in made.states if s.unknown and is_facts(name)):
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
