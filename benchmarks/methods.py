"""Every editor and every unlearner on equal terms, on knowledge that was just taught and on what the model came with.

    python benchmarks/methods.py tofu --data tofu --work runs/tofu --out benchmarks/results/methods_tofu.json
    python benchmarks/methods.py known --facts known_facts.json --work runs/known \\
        --out benchmarks/results/methods_known.json

``tofu``: the model is taught 20 made-up authors (TOFU's forget10) and forgets two of them (forget01); forget quality is
against a model that was taught the other 18. ``known``: it forgets facts that it answers by itself. Either way
``compare`` gives each method the same facts, retain set and number of trials, and what it chooses is rounded to 4 bits
and relearned. All steps are commands of the package with folders in --work; the command goes on where it was
interrupted, and more ``--methods`` can be added later. With the demo model on two CPU cores the two models of ``tofu``
take about half an hour each, a method 5 to 30 minutes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.comparing.sweep import Arm
from editunlearn.resources import shipped_names

SUITE = "tofu:forget01"
TREATMENTS = ("int4", "relearn:5")
COLUMNS = {
    "forget quality": (SUITE, "forget_quality"),
    "KS": (SUITE, "forget_quality_ks"),
    "utility": (SUITE, "model_utility"),
    "forget ROUGE-L": (SUITE, "forget.rouge_l"),
    "world facts": (SUITE, "world_facts.rouge_l"),
    "leak": ("facts", "forget.leak"),
    "refused": ("facts", "forget.refusal"),
    "leak, paraphrases": ("facts", "paraphrases.leak"),
    "leak, distracted": ("facts", "distracted.leak"),
    "retain": ("facts", "retain.correct"),
    "held out": ("facts", "heldout.correct"),
    "perplexity": ("facts", "perplexity"),
    "leak, 4 bits": ("facts-int4", "forget.leak"),
    "retain, 4 bits": ("facts-int4", "retain.correct"),
    "leak, relearned": ("facts-relearn", "forget.leak"),
}
"""Of the table: where a number is from, and its name there."""


@dataclass(frozen=True)
class Setting:
    """What is forgotten by what model.

    Attributes:
        more: flags of ``compare`` and ``evaluate`` for other benchmarks. reference: results of who never knew.
    """

    model: str
    facts: Path
    retain: Path
    more: tuple[str, ...] = ()
    reference: Path | None = None


def shipped() -> list[str]:
    """All tuned settings that come with the package; beside localised ones compare puts a random mask."""
    names = (name.removesuffix(".yaml") for name in shipped_names("hparams"))
    return [name for name in names if not name.startswith("paper/")]


def call(main: Callable[[Sequence[str]], int], *words: str | Path) -> None:
    """One command; ends this one where it fails."""
    code = main([str(word) for word in words])
    if code != 0:
        raise SystemExit(code)


def rows(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON file, or of one with a record a line."""
    from editunlearn.facts.sources import read_rows

    return [dict(row.data) for row in read_rows(path).rows]


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """A record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return path


def tofu(args: argparse.Namespace) -> Setting:
    """Two models are taught, and who never knew is measured."""
    from editunlearn import evaluate, finetune

    work, data = args.work, args.work / "data" / "TOFU"
    everything = rows(args.data / "forget10_perturbed.json")
    gone = {record["question"] for record in rows(args.data / "forget01.json")}
    facts = write(work / "all.jsonl", everything)
    forget = write(work / "forget.jsonl", [r for r in everything if r["question"] in gone])
    stay = [r for r in everything if r["question"] not in gone]
    retain = write(work / "retain.jsonl", stay)
    every = max(1, len(stay) // args.asked)
    write(data / "retain_perturbed.jsonl", stay[::every])  # of those that were taught
    for name in ("forget01_perturbed", "real_authors_perturbed", "world_facts_perturbed", "holdout01"):
        write(data / f"{name}.jsonl", rows(args.data / f"{name}.json"))
    taught, gold = work / "taught", work / "never-knew"
    teach = ("--model", args.model, "--facts", facts, "--epochs", str(args.epochs))
    call(finetune.main, *teach, "--out", taught)
    call(finetune.main, *teach, "--without", forget, "--out", gold)
    suite = ("--suite", SUITE, "--data-root", data.parent)
    own = ("--facts", forget, "--retain", retain)
    call(evaluate.main, "--model", gold, *suite, "--suite", "facts", *own, "--out", work / "measured" / "never-knew")
    reference = work / "measured" / "never-knew" / "base" / SUITE.replace(":", "-")
    return Setting(str(taught), forget, retain, tuple(map(str, suite)), reference)


def known(args: argparse.Namespace) -> Setting:
    """Facts that the model answers at top-1, some to forget and some to retain."""
    import grid

    from editunlearn.facts.readers import load_facts
    from editunlearn.general import known_by
    from editunlearn.lm.loading import default_cache_dir, load

    facts = load_facts(args.facts)
    knows = known_by(load(args.model), facts, default_cache_dir())
    facts = [fact for fact, yes in zip(facts, knows, strict=True) if yes]
    parts = grid.split(facts, (args.forget, args.retain), args.seed)
    files = [
        write(
            args.work / f"{name}.jsonl", [{"prompt": f.prompt, "subject": f.subject, "answer": f.answer} for f in part]
        )
        for name, part in zip(("forget", "retain"), parts, strict=False)
    ]
    return Setting(args.model, *files)


def compared(args: argparse.Namespace, made: Setting) -> dict[str, Any]:
    """All methods, and what of each is chosen."""
    from editunlearn import compare

    words: list[str | Path] = ["--model", made.model, "--facts", made.facts, "--retain", made.retain]
    words += ["--suite", "quick", *made.more, "--methods", ",".join(args.methods), "--trials", str(args.trials)]
    words += ["--reference", made.reference] if made.reference else []
    words += ["--trained-on", str(args.trained_on)] if args.trained_on else []
    call(compare.main, *words, "--out", args.work / "compare")
    found: dict[str, Any] = json.loads((args.work / "compare" / "comparison.json").read_text())["methods"]
    return found


def attacked(args: argparse.Namespace, made: Setting, name: str, delta: Path | None) -> Path:
    """All facts asked of one state, as it is, in 4 bits and relearned; the folder of the results."""
    from editunlearn import evaluate

    out = args.work / "measured" / name.replace("/", "-")
    words: list[str | Path] = [
        "--model",
        made.model,
        "--suite",
        "facts",
        "--facts",
        made.facts,
        "--retain",
        made.retain,
    ]
    words += [] if delta is None else ["--delta", delta]
    for treatment in TREATMENTS:
        words += ["--under", treatment]
    call(evaluate.main, *words, "--out", out)
    return out


def row(name: str, folders: Sequence[Path], cost: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Numbers of one state, from all results below some folders."""
    values: dict[str, Any] = {}
    for file in (f for folder in folders for f in sorted(folder.rglob("results.json"))):
        found = json.loads(file.read_text())
        if "suite" in found and found.get("half") is None:
            place = "-".join(filter(None, (found["suite"], (found.get("under") or "").partition(":")[0])))
            values |= {
                column: (found["summary"].get(metric) or {}).get("value")
                for column, (where, metric) in COLUMNS.items()
                if where == place
            }
    return {"name": name, "values": values, "cost": cost}


def table(done: Mapping[str, Any]) -> str:
    """Markdown: commands, then a row for each state."""
    env = ", ".join(f"{k} {v}" for k, v in done["environment"].items())
    columns = [c for c in COLUMNS if any(r["values"].get(c) is not None for r in done["rows"])]
    lines = [*(f"    {c}" for c in done["commands"]), "", env, ""]
    lines += ["| " + " | ".join(("method", *columns, "seconds", "FLOPs", "weights changed")) + " |"]
    lines += ["|---" * (len(columns) + 4) + "|"]
    for r in done["rows"]:
        cells = [_shown(r["values"].get(c)) for c in columns]
        cost = r["cost"] or {}
        cells += [_shown(cost.get(name)) for name in ("seconds", "flops", "changed")]
        lines.append("| " + " | ".join((r["name"], *cells)) + " |")
    failed = [f"- {name}: {why}" for name, why in done["failed"].items()]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main() -> None:
    """One setting."""
    from editunlearn.pipeline import environment

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", default="demo")
    common.add_argument("--methods", nargs="+", default=shipped())
    common.add_argument("--trials", type=int, default=1)
    common.add_argument("--trained-on", type=float, help="tokens; of Gemma-3-270M its makers say 6e12")
    common.add_argument("--work", type=Path, required=True)
    common.add_argument("--out", type=Path, required=True)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = p.add_subparsers(dest="setting", required=True)
    one = settings.add_parser("tofu", parents=[common])
    one.add_argument("--data", type=Path, required=True, help="folder with TOFU's files")
    one.add_argument("--epochs", type=int, default=10)
    one.add_argument("--asked", type=int, default=60, help="questions about the authors that stay, for the utility")
    one.set_defaults(make=tofu)
    other = settings.add_parser("known", parents=[common])
    other.add_argument("--facts", type=Path, required=True)
    other.add_argument("--forget", type=int, default=40)
    other.add_argument("--retain", type=int, default=40)
    other.add_argument("--seed", type=int, default=0)
    other.set_defaults(make=known)
    args = p.parse_args()
    made = args.make(args)
    there = json.loads(args.out.read_text()) if args.out.is_file() else {}
    command = shlex.join(["python", "benchmarks/methods.py", *sys.argv[1:]])
    commands = [*(c for c in there.get("commands", []) if c != command), command]
    args.methods = list(dict.fromkeys([*there.get("methods", []), *args.methods]))
    found = compared(args, made)

    def others(folder: Path) -> list[Path]:
        return [] if made.reference is None else [folder / made.reference.name]

    states = [row("unedited", [attacked(args, made, "base", None), *others(args.work / "compare" / "base")])]
    if made.reference is not None:
        states.append(row("never knew", [made.reference.parent]))
    failed = {}
    for name, method in found.items():
        if method["chosen"] is None:
            failed[name] = "; ".join(dict.fromkeys(method["failed"].values()))
            continue
        best = f"trial{method['chosen']}-seed0"
        folder = args.work / "compare" / "runs" / Arm(name, ()).folder / best
        cost = next(c for c in method["costs"] if (c["trial"], c["seed"]) == (method["chosen"], 0))
        states.append(row(name, [attacked(args, made, name, folder), *others(folder)], cost))
    done = {"commands": commands, "environment": dict(environment()), "methods": args.methods}
    done |= {"rows": states, "failed": failed}
    atomic_write_json(args.out, done)
    atomic_write_text(args.out.with_suffix(".md"), table(done))
    sys.stdout.write(table(done))


if __name__ == "__main__":
    main()
