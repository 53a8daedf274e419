"""What brings forgotten facts back: every attack on a saved delta, beside the model before the edit.

    python benchmarks/attacks.py --run runs/memit --facts data/demo_forget.jsonl --out benchmarks/results/attacks.json

Relearning trains on every other fact and counts the leaks of those it did not see.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.evaluation.attacks import probing, prompting
from editunlearn.evaluation.attacks.quantisation import SCHEMES, quantised
from editunlearn.evaluation.attacks.relearning import Relearn, relearned
from editunlearn.evaluation.attacks.subspace import ablated
from editunlearn.evaluation.metrics.intervals import estimate
from editunlearn.facts.readers import load_facts
from editunlearn.facts.targets import DEFAULT_TARGETS, fill_targets
from editunlearn.lm.tokens import encode


def share(hits: list[bool]) -> dict[str, float | int] | None:
    """A rate with its interval."""
    found = estimate([float(h) for h in hits])
    return found._asdict() if found else None


class Attacker:
    """One model, its delta, and the facts that were forgotten."""

    def __init__(self, lm: Any, delta: Any, facts: list[Any], others: list[Any], steps: list[int]) -> None:
        self.lm, self.delta, self.facts, self.others, self.steps = lm, delta, facts, others, steps

    def said(self, facts: list[Any]) -> dict[str, Any]:
        """Leaks and refusals of the model as it computes now."""
        from editunlearn.evaluation.scoring import ask, asked

        answers = ask(self.lm, [asked(self.lm, f) for f in facts])
        return {"leak": share([a.leaked for a in answers]), "refusal": share([a.refused for a in answers])}

    def prompts(self) -> dict[str, Any]:
        """By attack: facts that any variant brought out."""
        found = prompting.run(self.lm, self.facts, self.others)
        return {
            f"prompting: {name}": {"leak": share([a.recovered for a in of if a.recovered is not None])}
            for name, of in found.items()
        }

    def probes(self) -> dict[str, Any]:
        """Facts whose answer's first token is the likeliest, or among the ten likeliest, after any block."""
        rows = [encode(self.lm, _prompt(self.lm, f), f.answer, "prompt_last") for f in self.facts]
        lens = probing.logit_lens(self.lm, rows)
        read = {k: [bool(x) for x in lens.readable(k)] for k in (1, 10)}
        return {f"logit lens: top {k} after any block": {"leak": share(hits)} for k, hits in read.items()}

    def relearns(self) -> dict[str, Any]:
        """Leaks of the facts that were not trained on."""
        seen, unseen = self.facts[::2], self.facts[1::2]
        rows = [encode(self.lm, _prompt(self.lm, f), f.answer, "prompt_last") for f in seen]
        found = {}
        for what in ("full", "lora"):
            for steps in self.steps:
                with relearned(self.lm, rows, Relearn(steps=steps, what=what)):  # type: ignore[arg-type]
                    found[f"relearning: {what}, {steps} steps on the other half"] = self.said(unseen)
        return found

    def all(self) -> dict[str, dict[str, Any]]:
        """Every attack on the edited model, and what the unedited one says."""
        found = {"no edit": self.said(self.facts)}
        with self.delta.applied(self.lm):
            found["edited, no attack"] = self.said(self.facts)
            for stage in (self.prompts, self.probes, self.relearns):
                found |= stage()
        for scheme in SCHEMES:
            with quantised(self.lm, scheme, self.delta):
                found[f"quantisation: {scheme}"] = self.said(self.facts)
        for count in (1, 4):
            with ablated(self.lm, self.delta, count):
                found[f"subspace: {count} directions removed"] = self.said(self.facts)
        return found


def _prompt(lm: Any, fact: Any) -> Any:
    from editunlearn.lm.tokens import wrap

    return wrap(lm, fact.prompt, (fact.subject_start, fact.subject_end), question=fact.is_question)


def _shown(rate: dict[str, Any] | None) -> str:
    return f"{rate['value']:.0%} ({rate['low']:.0%} to {rate['high']:.0%})" if rate else ""


def table(done: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"    {done['command']}", "", ", ".join(f"{k} {v}" for k, v in done["environment"].items()), ""]
    lines += [f"{done['method']}, {done['facts']} facts; with 95% intervals.", ""]
    lines += ["| attack | leaked | refused |", "|---|---|---|"]
    for name, rates in done["attacks"].items():
        cells = [_shown(rates.get(kind)) for kind in ("leak", "refusal")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Attack one run."""
    from editunlearn.deltas.files import load as load_delta
    from editunlearn.lm.loading import load
    from editunlearn.pipeline import environment

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--facts", type=Path, required=True, help="what was forgotten")
    p.add_argument("--others", type=Path, default=Path("data/demo_retain.jsonl"), help="known facts, for examples")
    p.add_argument("--model", default="demo")
    p.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20], help="of relearning")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    lm, delta = load(args.model), load_delta(args.run)
    facts = fill_targets(load_facts(args.facts), DEFAULT_TARGETS, seed=0)
    start = time.perf_counter()
    found = Attacker(lm, delta, list(facts), list(load_facts(args.others)), args.steps).all()
    done = {
        "command": shlex.join(["python", "benchmarks/attacks.py", *sys.argv[1:]]),
        "environment": dict(environment()),
        "method": delta.manifest.method,
        "facts": len(facts),
        "seconds": round(time.perf_counter() - start, 1),
        "attacks": found,
    }
    atomic_write_json(args.out, done)
    atomic_write_text(args.out.with_suffix(".md"), table(done))
    sys.stdout.write(table(done))


if __name__ == "__main__":
    main()
