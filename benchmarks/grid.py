"""Runs of a grid: configurations, numbers of facts, at once or one request after another. A finished run is kept."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quality

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.facts.readers import load_facts
from editunlearn.facts.records import Fact, ForgetRequest
from editunlearn.facts.targets import DEFAULT_TARGETS
from editunlearn.hparams import load_hparams, resolved

REQUESTS = 10
"""Requests that a sequential run is cut into, at most."""

FORMS = {
    "shipped": ("", ()),
    "closed": (", closed form alone, preserving a tenth", ("refine=null", "moments.weight=1000.0", "value.steps=20")),
}
"""Forms of editors, with what their rows are called; as shipped the closed form leaves most of the work to refine:
few steps of values, and so much preserved that hardly a fact goes."""


@dataclass(frozen=True)
class Cell:
    """One run: an hparams file with settings, so many facts, in one request (``batch``) or in ``REQUESTS``, and what is
    said instead of them. No two that differ in what is said may share a name."""

    name: str
    hparams: str
    facts: int
    way: str = "batch"
    set: tuple[str, ...] = ()
    targets: str = DEFAULT_TARGETS

    def settings(self) -> Any:
        """The settings, checked."""
        return load_hparams(self.hparams, set=list(self.set))


def flags(text: str) -> argparse.ArgumentParser:
    """What both benchmarks understand."""
    p = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--facts", required=True, type=Path)
    p.add_argument("--text", required=True, type=Path, help="raw WikiText, for perplexity")
    p.add_argument("--forget", type=Path, help="what to forget, known or not, instead of facts of --facts")
    p.add_argument("--sizes", type=int, nargs="+", help="facts to forget")
    p.add_argument("--retain", type=int, default=40)
    p.add_argument("--heldout", type=int, default=100)
    p.add_argument("--all", action="store_true", help="also facts that the model does not answer at top-1")
    p.add_argument("--set", nargs="+", default=[], help="settings of every run, such as value.steps=3")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    return p


def edited(
    lm: Any, cell: Cell, forget: Sequence[Fact], retain: Sequence[Fact], general: Any, cache: Path | None
) -> Any:
    """The delta of one run; ``forget`` have targets.

    Raises:
        NumericalError: the run was stopped, or went wrong.
    """
    from editunlearn import editors
    from editunlearn.editors.earlier import Earlier

    size = len(forget) if cell.way == "batch" else -(-len(forget) // REQUESTS)
    earlier, delta = None, None
    for start in range(0, len(forget), size):
        request = ForgetRequest(
            tuple(forget[start : start + size]),
            tuple(retain),
            tuple(general.known),
            tuple(general.names),
            earlier=tuple(forget[:start]),
        )
        delta, past = editors.run(
            lm, request, cell.settings(), earlier=earlier, cache=cache, target_strategy=cell.targets
        )
        earlier = Earlier(delta, past)
    return delta


def measured(lm: Any, parts: Any, text: list[list[int]]) -> dict[str, float]:
    """Scores of :mod:`quality`, and fluency (ROME's n-gram entropy of what is said to held-out prompts)."""
    from editunlearn.editors.contexts import prompt_of
    from editunlearn.evaluation.metrics.text import ngram_entropy
    from editunlearn.lm.generation import generate

    said = generate(lm, [prompt_of(lm, fact) for fact in parts[2]], max_new_tokens=32)
    return {**quality.score(lm, parts, text), "fluency": sum(map(ngram_entropy, said)) / len(said)}


def run(cells: Sequence[Cell], args: argparse.Namespace, script: str) -> dict[str, Any]:
    """All runs that are not there yet; JSON and table are written after each."""
    from editunlearn.console import Console
    from editunlearn.errors import NumericalError
    from editunlearn.general import general_facts, known_by
    from editunlearn.lm.loading import default_cache_dir, load
    from editunlearn.pipeline import environment, with_targets

    lm, cache, console = load(args.model), default_cache_dir(), Console(quiet=True)
    facts = load_facts(args.facts)
    if not args.all:
        facts = [fact for fact, knows in zip(facts, known_by(lm, facts, cache), strict=True) if knows]
    most = max(cell.facts for cell in cells)
    forget, retain, heldout = split(facts, (0 if args.forget else most, args.retain, args.heldout), args.seed)
    if args.forget:
        forget = load_facts(args.forget)
    text = quality.wikitext(args.text, lm)
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"runs": []}
    command = shlex.join(["python", script, *sys.argv[1:]])
    done["commands"] = [*(c for c in done.get("commands", []) if c != command), command]
    done["environment"] = dict(environment())
    for cell in cells:
        if len(forget) < cell.facts:
            sys.stdout.write(f"{cell.name}, {cell.facts} facts: left out, there are {len(forget)}\n")
            continue
        sizes = [cell.facts, len(retain), len(heldout)]
        key = {"name": cell.name, "way": cell.way, "facts": cell.facts, "sizes": sizes, "seed": args.seed}
        key |= {"model": args.model, "data": (args.forget or args.facts).name, "hparams": resolved(cell.settings())}
        key = json.loads(json.dumps(key))
        if any(all(there.get(k) == v for k, v in key.items()) for there in done["runs"]):
            continue
        own = with_targets(
            lm, forget[: cell.facts], cell.targets, seed=args.seed, retain=retain, cache=cache, console=console
        )
        general = general_facts(lm, [*own, *heldout], retain, cache, console)
        parts = (own, retain, heldout)
        key["base"] = next(_same_base(done["runs"], key), None) or measured(lm, parts, text)
        start = time.perf_counter()
        try:
            delta = edited(lm, cell, own, retain, general, cache)
        except NumericalError as error:
            found: dict[str, Any] = {"edited": None, "stopped": str(error)}
        else:
            seconds = round(time.perf_counter() - start, 1)
            with delta.applied(lm):
                found = {"edited": measured(lm, parts, text), "stopped": "", "fit_seconds": seconds}
            found["delta_mb"] = delta.nbytes / 1e6
        done["runs"].append({**key, **found})
        atomic_write_json(args.out, done)
        atomic_write_text(args.out.with_suffix(".md"), table(done))
        sys.stdout.write(row(done["runs"][-1]) + "\n")
        sys.stdout.flush()
    return done


def split(facts: list[Fact], sizes: tuple[int, int, int], seed: int) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Forget, retain and held-out facts, no subject in two of them; facts about one subject stand together, so that
    of many questions about few subjects the first so many are about as few as can be."""
    subjects = sorted({fact.subject for fact in facts})
    random.Random(seed).shuffle(subjects)
    together = sorted(facts, key=lambda fact: subjects.index(fact.subject))
    taken: set[str] = set()
    parts = []
    for size in sizes[1:]:  # from the end, so that they are the same for every size
        own = [fact for fact in reversed(together) if fact.subject not in taken][:size]
        taken |= {fact.subject for fact in own}
        parts.append(own)
    return [fact for fact in together if fact.subject not in taken][: sizes[0]], parts[0], parts[1]


def _same_base(runs: Sequence[dict[str, Any]], key: dict[str, Any]) -> Iterator[dict[str, float]]:
    """What was measured of the unedited model on the same facts."""
    return (r["base"] for r in runs if all(r[k] == key[k] for k in ("sizes", "seed", "model", "data")))


COLUMNS = ("leak", "refusal", "leak_distracted", "retain_accuracy", "heldout_accuracy", "heldout_refusal")
HEAD = "| run | way | facts | leak | refused | leak, distracted | retain | held out | held out refused | perplexity "
HEAD += "| fluency | MB | seconds |"


def row(run: dict[str, Any]) -> str:
    """One line of the table, each number before and after."""
    cells = [run["name"], run["way"], str(run["facts"])]
    base, now = run["base"], run["edited"]
    if now is None:
        return "| " + " | ".join([*cells, f"stopped: {run['stopped']}".replace("|", "/"), *[""] * 9]) + " |"
    cells += [f"{base[name]:.1%} > {now[name]:.1%}" for name in COLUMNS]
    cells += [f"{base[name]:.4g} > {now[name]:.4g}" for name in ("perplexity", "fluency")]
    return "| " + " | ".join([*cells, f"{run['delta_mb']:.3g}", f"{run['fit_seconds']:.0f}"]) + " |"


def table(done: dict[str, Any]) -> str:
    """Markdown of all runs, and which sequential ones are more than 5 points worse than the same facts at once."""
    env = ", ".join(f"{k} {v}" for k, v in done["environment"].items())
    commands = [f"    {command}" for command in done["commands"]]
    lines = [*commands, "", env, "", HEAD, "|" + "---|" * (HEAD.count("|") - 1), *map(row, done["runs"])]
    return "\n".join([*lines, "", *worse(done["runs"])]) + "\n"


def worse(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Sequential runs that fall more than 5 points behind their batch run, one line each, or that there are none."""
    at_once = {(r["name"], r["facts"], r["seed"]): r["edited"] for r in runs if r["way"] == "batch"}
    found, compared = [], 0
    for one in runs:
        other, now = at_once.get((one["name"], one["facts"], one["seed"])), one["edited"]
        if one["way"] == "batch" or other is None or now is None:
            continue
        compared += 1
        for name, sign in (("leak", 1), ("refusal", -1), ("retain_accuracy", -1), ("heldout_accuracy", -1)):
            if sign * (now[name] - other[name]) > 0.05:
                found.append(
                    f"- {one['name']}, {one['facts']} facts: {name} {other[name]:.1%} in batch, {now[name]:.1%} "
                    "sequentially: more than 5 points worse."
                )
    if compared and not found:
        found.append(f"None of {compared} sequential runs is more than 5 points worse than the same facts in batch.")
    return found
