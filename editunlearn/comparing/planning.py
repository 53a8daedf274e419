"""What the flags of ``compare`` ask for, checked before any weight is read."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import Checks, check_model, check_settings, check_writable, model_terms, read_facts
from editunlearn.errors import InputError

if TYPE_CHECKING:
    from editunlearn.comparing.gold import Reference
    from editunlearn.comparing.meter import Budget
    from editunlearn.comparing.sweep import Arm
    from editunlearn.console import Console
    from editunlearn.evaluation.suites import Module
    from editunlearn.evaluation.treatments import Treatment
    from editunlearn.facts.records import Fact

REQUEST = "request.json"
"""What the runs of a folder have in common; methods, trials and seeds may become more."""


@dataclass(frozen=True)
class Plan:
    """What the flags ask for, checked.

    Attributes:
        facts: with targets. how: what those came of.
        suites: other benchmarks, by name. facts_suite: the one that is asked in halves.
        treatments: after which chosen runs are asked again.
        reference: what they are held against, if anything.
        request: what the runs of ``--out`` have in common.
    """

    arms: list[Arm]
    facts: list[Fact]
    retain: list[Fact]
    budget: Budget
    facts_suite: tuple[str, Module]
    suites: dict[str, tuple[Module, Any]]
    treatments: list[Treatment]
    reference: Reference | None
    request: dict[str, Any]
    config: Any
    how: str


def plan(args: argparse.Namespace, console: Console) -> Plan:
    """Check all input; no weights are read.

    Raises:
        InputError: everything that is wrong.
    """
    from editunlearn.comparing import gold, sweep
    from editunlearn.comparing.meter import Budget
    from editunlearn.evaluation.treatments import parse
    from editunlearn.facts.records import content_hash
    from editunlearn.facts.targets import fill_targets, strategy
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
    if args.trained_on is not None and not 0 < args.trained_on < float("inf"):
        checks.problems.append(f"--trained-on {args.trained_on:g}: a number of tokens, above 0.")
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
    treatments = [t for text in args.under if (t := checks.run(lambda text=text: parse(text, 0)))]  # type: ignore[misc]
    reference = checks.run(lambda: gold.named(args, others)) if args.reference else None
    checks.run(lambda: check_writable(args.out, "--out"))
    checks.run(lambda: check_writable(args.cache_dir or default_cache_dir(), "--cache-dir"))
    request = {
        **model_terms(args),
        "facts": content_hash(given or []),
        "retain": content_hash(retain),
        "targets": args.targets,
        "suite": args.suite or ["quick"],
        "budget": str(budget),
        "under": [str(under) for under in treatments] or None,
        "reference": args.reference,
    }
    if not args.fresh:
        checks.run(lambda: _check_out(args.out, request))
    checks.finish()
    assert budget is not None and own is not None  # noqa: S101 - finish() raised otherwise
    how = strategy(given or [], args.targets)
    return Plan(arms, facts, retain, budget, own, others, treatments, reference, request, config, how)


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


def clear(out: Path) -> None:
    """Remove an earlier comparison, and nothing that is none.

    Raises:
        InputError: there is something else.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / REQUEST).is_file():
        raise InputError(f"--out {out}: is not empty, and no comparison made it. Choose another folder.")
    shutil.rmtree(out, ignore_errors=True)
