"""Refusals before any edit: one text for all, one of the bank for each fact, and the model's own words.

    python benchmarks/refusals.py --facts data/demo_forget.jsonl --out benchmarks/results/refusals.json

Natural: perplexity of the refusal behind the prompt, under the unedited model. Topical: it names the subject. What each
does to an edit is in ``quality.py``.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.console import Console
from editunlearn.evaluation.metrics.text import leaks, names_subject
from editunlearn.facts.readers import load_facts
from editunlearn.facts.records import Fact, answers
from editunlearn.facts.targets import DEFAULT_TARGETS


def scores(lm: Any, facts: list[Fact]) -> dict[str, float]:
    """Means over facts with targets."""
    from editunlearn.editors.contexts import prompt_of
    from editunlearn.lm.likelihood import token_scores
    from editunlearn.lm.tokens import encode

    found = token_scores(lm, [encode(lm, prompt_of(lm, f), f.target) for f in facts])
    said = [f.target or "" for f in facts]
    losses = [score.without_last().loss for score in found]
    return {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "names the subject": sum(map(names_subject, said, [f.subject for f in facts])) / len(facts),
        "different texts": len(set(said)) / len(facts),
        "words": sum(len(text.split()) for text in said) / len(facts),
        "leaks": sum(leaks(text, answers(f)) for text, f in zip(said, facts, strict=True)) / len(facts),
    }


def table(done: dict[str, Any]) -> str:
    """Markdown."""
    names = list(next(iter(done["targets"].values()))["scores"])
    lines = [f"    {done['command']}", "", ", ".join(f"{k} {v}" for k, v in done["environment"].items()), ""]
    lines += [f"{done['facts']} facts. {done['written']}", ""]
    lines += [f"| targets | {' | '.join(names)} | seconds |", f"|---|{'---|' * (len(names) + 1)}"]
    for name, of in done["targets"].items():
        cells = [f"{of['scores'][n]:.3g}" for n in names]
        lines.append(f"| {name} | {' | '.join(cells)} | {of['seconds']:.1f} |")
    lines += ["", "| asked | in the model's own words, or shipped |", "|---|---|"]
    lines += [f"| {asked} | {said} |" for asked, said in done["examples"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write and compare."""
    from editunlearn.lm.loading import load
    from editunlearn.pipeline import environment, with_targets

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--facts", type=Path, required=True)
    p.add_argument("--model", default="demo")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    lm, facts = load(args.model), load_facts(args.facts)
    said: list[str] = []
    console = Console()
    console.info = said.append  # type: ignore[method-assign,assignment]
    found = {}
    for spec in (DEFAULT_TARGETS, "refusal", "self"):
        start = time.perf_counter()
        filled = with_targets(lm, facts, spec, seed=args.seed, console=console)
        found[spec] = {"seconds": time.perf_counter() - start, "scores": scores(lm, filled)}
    done = {
        "command": shlex.join(["python", "benchmarks/refusals.py", *sys.argv[1:]]),
        "environment": dict(environment()),
        "facts": len(facts),
        "written": said[-1],
        "targets": found,
        "examples": [(f.prompt, f.target) for f in filled],
    }
    atomic_write_json(args.out, done)
    atomic_write_text(args.out.with_suffix(".md"), table(done))
    sys.stdout.write(table(done))


if __name__ == "__main__":
    main()
