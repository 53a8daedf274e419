"""Every editor and every unlearner on the same facts, with the same columns: facts just taught, or known all along.

    python benchmarks/methods.py tofu_mini --data tofu --out benchmarks/results/tofu_mini.json
    python benchmarks/methods.py known --data known_facts.json --out benchmarks/results/known_40.json

``tofu_mini`` teaches the model 20 authors of TOFU (``--data``: its folder) and another model all but the last two,
makes it forget these two, and holds every method against the model that never knew. ``known`` forgets 40 facts that
the model answers at top-1. Killed, the same command goes on. ``--methods`` takes some of them: what several commands
found gathers in ``--out``, as long as they ask the same.

On two cores with the demo model, by counted operations (``compare --dry-run``, 0.3 TFLOP a second): teaching 25 minutes
a model, an editor 10 minutes, an unlearner 2, asking each 3 to 5; all of them 5 to 6 hours, ``known`` 4.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grid
import mini

from editunlearn.__main__ import main as editunlearn
from editunlearn.artifacts import atomic_write_json, atomic_write_text, cached_json
from editunlearn.resources import shipped_names

GROUP = 6
"""Methods of one comparison, after which what was found is written."""
LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        "anyedit": "MEMIT with long targets in chunks; a refusal is one chunk, so that it is `memit`",
        "rome": "one fact at a time; `r_rome` is the same with a consistent key",
    }
)
"""Shipped methods that have no row of their own, and why."""
UNDER = ("int4", "relearn:5:0.0001")
TOFU = "tofu:forget01 "
COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "forget.leak": "leak",
        "forget.refusal": "refused",
        "distracted.leak": "leak, distracted",
        "paraphrases.leak": "leak, paraphrases",
        "retain.correct": "retain kept",
        "heldout.correct": "held out kept",
        "over_refusal": "wrongly refused",
        "perplexity": "perplexity",
        f"{UNDER[0]} forget.leak": "leak, 4 bits",
        f"{UNDER[0]} forget.refusal": "refused, 4 bits",
        f"{UNDER[1]} forget.leak": "leak, relearned",
        f"{TOFU}forget_quality": "forget quality (p)",
        f"{TOFU}forget_quality_ks": "KS",
        f"{TOFU}model_utility": "model utility",
        f"{TOFU}forget.rouge_l": "ROUGE, forgotten",
        f"{TOFU}retain.rouge_l": "ROUGE, other authors",
        f"{TOFU}real_authors.rouge_l": "ROUGE, real authors",
        f"{TOFU}world_facts.rouge_l": "ROUGE, world facts",
    }
)
"""What the table shows of the test half of each comparison; what was not measured in any row is left out."""
COSTS = ("seconds", "peak GB", "FLOPs", "tokens", "weights changed", "cheaper than pretraining")


@dataclass(frozen=True)
class Asked:
    """What a setting asks ``compare``.

    Attributes:
        flags: that say so, without methods.
        facts, retain: how many. taught: what ``finetune`` recorded of the model and of the reference.
    """

    flags: list[str]
    sizes: dict[str, int]
    taught: dict[str, Any]


def command(*words: str) -> None:
    """One of our commands, in this process; it ends everything if it fails."""
    code = editunlearn(list(words))
    if code:
        raise SystemExit(code)


def tofu_mini(args: argparse.Namespace) -> Asked:
    """Teach both models, unless that was done."""
    work: Path = args.work
    sizes = mini.write(args.data, work / "data", args.authors, args.questions, args.shown, args.others)
    files = {name: str(work / "data" / f"{name}.jsonl") for name in ("taught", "forget", "retain")}
    given = [word for name in ("epochs", "lr", "batch") if (v := getattr(args, name)) for word in (f"--{name}", str(v))]
    made = {}
    for name, less in (("taught", []), ("never-knew", ["--without", files["forget"]])):
        words = ["--model", args.model, "--facts", files["taught"], *less, *given, *_cache(args)]
        command("finetune", *words, "--out", str(work / name), "--quiet")
        record = json.loads((work / name / "taught.json").read_text())
        made[name] = {key: record[key] for key in ("facts", "seconds", "known")}
    flags = ["--model", str(work / "taught"), "--reference", str(work / "never-knew")]
    flags += ["--facts", files["forget"], "--retain", files["retain"], "--data-root", str(work / "data")]
    return Asked([*flags, "--suite", "quick", "--suite", TOFU.strip()], sizes, made)


def known(args: argparse.Namespace) -> Asked:
    """Facts that the model answers at top-1, some to forget and some to keep, no subject in both."""
    from editunlearn.facts.readers import load_facts
    from editunlearn.general import known_by
    from editunlearn.lm.loading import default_cache_dir, load

    files = {name: args.work / "data" / f"{name}.jsonl" for name in ("forget", "retain")}
    if not all(file.is_file() for file in files.values()):
        facts = load_facts(args.data)
        told = known_by(load(args.model), facts, args.cache_dir or default_cache_dir())
        mine = [fact for fact, knows in zip(facts, told, strict=True) if knows]
        forget, retain, _ = grid.split(mine, (args.facts, args.retain, 0), args.seed)
        for name, rows in (("forget", forget), ("retain", retain)):
            mini.write_lines(files[name], [mini.record(fact) for fact in rows])
    sizes = {name: len(file.read_text().splitlines()) for name, file in files.items()}
    flags = ["--model", args.model, "--facts", str(files["forget"]), "--retain", str(files["retain"])]
    return Asked([*flags, "--suite", "quick"], sizes, {})


SETTINGS: Mapping[str, Callable[[argparse.Namespace], Asked]] = MappingProxyType(
    {"tofu_mini": tofu_mini, "known": known}
)


def names() -> list[str]:
    """Shipped hparams but those of papers and those left out: every registered method, and the seven."""
    found = [name.removesuffix(".yaml") for name in shipped_names("hparams")]
    return [name for name in found if not name.startswith("paper/") and name not in LEFT_OUT]


def _cache(args: argparse.Namespace) -> list[str]:
    return ["--cache-dir", str(args.cache_dir)] if args.cache_dir else []


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("setting", choices=SETTINGS)
    p.add_argument("--data", type=Path, required=True, help="TOFU's folder (full.json, ...), or a file of facts")
    p.add_argument("--out", type=Path, required=True, help="JSON; the table goes beside it")
    p.add_argument("--work", type=Path, help="folder of models and runs (default: runs/SETTING)")
    p.add_argument("--model", default="demo")
    p.add_argument("--cache-dir", type=Path)
    p.add_argument("--methods", nargs="+", help="only these (default: all)")
    p.add_argument("--trials", type=int, default=1)
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument(
        "--pretraining", type=float, default=6e12, help="tokens of the model's pretraining (the demo's: 6e12)"
    )
    group = p.add_argument_group("tofu_mini")
    group.add_argument("--authors", type=int, default=18, help="authors that stay, beside the two that are forgotten")
    group.add_argument("--questions", type=int, default=20, help="questions an author")
    group.add_argument("--shown", type=int, default=6, help="authors that stay and are given to the methods as such")
    group.add_argument("--others", type=int, default=30, help="questions about other authors, real ones, the world")
    group.add_argument("--epochs", type=int)
    group.add_argument("--lr", type=float)
    group.add_argument("--batch", type=int)
    group = p.add_argument_group("known")
    group.add_argument("--facts", type=int, default=40, help="to forget")
    group.add_argument("--retain", type=int, default=40, help="given as such")
    group.add_argument("--seed", type=int, default=1, help="of the draw")
    return p


def main() -> None:
    """Prepare, compare group by group, gather."""
    args = flags().parse_args()
    args.work = args.work or Path("runs") / args.setting
    asked = SETTINGS[args.setting](args)
    wanted: Sequence[str] = args.methods or names()
    terms = ["--trials", str(args.trials), "--seeds", str(args.seeds), *(w for u in UNDER for w in ("--under", u))]
    for start in range(0, len(wanted), GROUP):
        some = ",".join(wanted[start : start + GROUP])
        out = args.work / "compare"
        command("compare", *asked.flags, *terms, *_cache(args), "--methods", some, "--out", str(out), "--quiet")
        gathered = gather(args, asked, json.loads((out / "comparison.json").read_text()))
        atomic_write_json(args.out, gathered)
        atomic_write_text(args.out.with_suffix(".md"), table(gathered))
    sys.stdout.write(args.out.with_suffix(".md").read_text())


def gather(args: argparse.Namespace, asked: Asked, found: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--out`` has and what a comparison found, one dictionary.

    Raises:
        SystemExit: they did not ask the same.
    """
    from editunlearn.pipeline import environment

    told = ("facts", "retain", "targets", "suite", "under", "trials", "seeds", "dtype")
    terms = {"setting": args.setting, "model": args.model, **{key: found["request"][key] for key in told}}
    there: dict[str, Any] = cached_json(args.out, dict) or {"terms": terms, "commands": [], "rows": {}, "failed": {}}
    other = [key for key, value in terms.items() if there["terms"].get(key) != value]
    if other:
        raise SystemExit(f"{args.out}: was asked otherwise (other {', '.join(other)}). Give another --out.")
    line = {"command": shlex.join(["python", "benchmarks/methods.py", *sys.argv[1:]]), **environment()}
    there["commands"] = [*(c for c in there["commands"] if c != line), line]
    there |= {"sizes": asked.sizes, "taught": asked.taught, "left_out": dict(LEFT_OUT)}
    for row in found["views"]["chosen"]:
        values = {name: value["value"] for name, value in row["values"].items() if value["value"] is not None}
        notes = {name: v["reason"] for name, v in row["values"].items() if v["value"] is None and v["reason"]}
        one = {"setting": row["setting"], "values": values, "not_measured": notes}
        method = found["methods"].get(row["name"])
        if method is not None:
            costs = [cost for cost in method["costs"] if cost["trial"] == method["chosen"]]
            one["cost"] = {**costs[0], "cheaper": _cheaper(args, costs[0]["flops"])}
        there["rows"][row["name"]] = one
    there["failed"] |= {name: m["failed"] for name, m in found["methods"].items() if m["failed"]}
    return there


def _cheaper(args: argparse.Namespace, flops: float) -> float:
    """How many times more operations the model's pretraining takes, in passages of 512 tokens."""
    from editunlearn.comparing.retraining import per_token
    from editunlearn.lm.sources import peek_config

    return float(args.pretraining * per_token(peek_config(args.model), 512).trained / flops)


def table(found: Mapping[str, Any]) -> str:
    """Markdown: what is left of the facts and of the rest, then what it took, then what failed."""
    shown = {n: text for n, text in COLUMNS.items() if any(n in row["values"] for row in found["rows"].values())}
    lines = [f"    {one['command']}" for one in found["commands"]]
    env = {key: value for key, value in found["commands"][-1].items() if key != "command"}
    lines += ["", ", ".join(f"{key} {value}" for key, value in env.items()), ""]
    lines += [", ".join(f"{name}: {count}" for name, count in found["sizes"].items()) + ".", ""]
    lines += [_taught(name, one) for name, one in found["taught"].items()]
    lines += ["", *_markdown(["method", *shown.values()], [[n, *_cells(r, shown)] for n, r in found["rows"].items()])]
    costs = [[name, *_cost(row["cost"])] for name, row in found["rows"].items() if "cost" in row]
    lines += ["", *_markdown(["method", *COSTS], costs), ""]
    lines += [f"- {n}, {run}, failed: {why}" for n, runs in found["failed"].items() for run, why in runs.items()]
    lines += [f"- {name} is left out: {why}." for name, why in found["left_out"].items()]
    return "\n".join(lines) + "\n"


def _taught(name: str, one: Mapping[str, Any]) -> str:
    after = one["known"]["answered"]["after"]
    return f"- `{name}`: {one['facts']} facts taught in {one['seconds']:.0f} s, {after:.1%} of them answered.\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _cells(row: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    values = row["values"]
    return [f"{values[name]:.3g}" if name in values else "-" for name in names]


def _cost(cost: Mapping[str, Any]) -> list[str]:
    memory = f"{cost['memory'] / 1e9:.2f}" if cost["memory"] is not None else "-"
    spent = f"{cost['seconds']:.0f}" + (" (resumed)" if cost["resumed"] else "")
    counted = [f"{cost['flops']:.3g}", f"{cost['tokens']:,}", f"{cost['changed']:.3%}", f"{cost['cheaper']:.2g} times"]
    return [spent, memory, *counted]


if __name__ == "__main__":
    main()
