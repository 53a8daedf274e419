"""Quality of editors on facts that a model really knows: what is gone, what stayed, by greedy decoding.

    python benchmarks/quality.py --facts known_facts.json --text test.txt --configs benchmarks/configs/default.yaml

Of the facts that the model answers at top-1, ``--forget`` are forgotten, ``--retain`` more are given as retain set, and
``--heldout`` others are never shown to any edit, nor are shipped facts about their subjects. A configuration is a name,
an hparams file and settings. Results go to JSON after every run, and a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.evaluation.states import slug
from editunlearn.facts.readers import comparable, load_facts
from editunlearn.facts.records import Fact, ForgetRequest
from editunlearn.facts.targets import DEFAULT_TARGETS
from editunlearn.hparams import load_hparams, resolved

DISTRACTION = "My neighbour told me a long story about his garden yesterday. "


def passages(path: Path, least: int = 400) -> list[str]:
    """Of each paragraph of raw WikiText the longest run of sentences without an unknown word, if it is long enough.

    The format's spaces before punctuation are removed. ``least`` is in characters.
    """
    found = []
    for paragraph in path.read_text(encoding="utf-8").split("\n"):
        runs: list[list[str]] = [[]]
        for sentence in re.split(r"(?<= [.?!]) ", paragraph.strip()):
            if "<unk>" in sentence:
                runs.append([])
            else:
                runs[-1].append(sentence)
        longest = max((" ".join(run) for run in runs), key=len)
        if len(longest) > least:
            text = re.sub(r" ([,.;:!?%)])", r"\1", re.sub(r" @(.)@ ", r"\1", longest))
            found.append(text.replace("( ", "(").replace(" 's", "'s"))
    return found


def wikitext(path: Path, lm: Any, length: int = 200) -> list[list[int]]:
    """The first ``length`` token ids of each passage."""
    from editunlearn.lm.windows import windows

    return [next(windows(lm, [text], length, 1 << 30)) for text in passages(path)]


def split(facts: list[Fact], sizes: tuple[int, int, int], seed: int) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Forget, retain and held-out facts; no subject is in two of them."""
    shuffled = facts[:]
    random.Random(seed).shuffle(shuffled)
    parts: list[list[Fact]] = []
    taken: set[str] = set()
    for size in sizes:
        free = [f for f in shuffled if comparable(f.subject) not in taken]
        parts.append(free[:size])
        taken |= {comparable(f.subject) for f in free[:size]}
    return parts[0], parts[1], parts[2]


def score(lm: Any, parts: tuple[list[Fact], list[Fact], list[Fact]], text: list[list[int]]) -> dict[str, float]:
    """Rates in [0, 1]: leak and refusal of forgotten facts (bare and behind a distraction), accuracy of the others."""
    from editunlearn.evaluation.scoring import ask, asked
    from editunlearn.lm.likelihood import perplexity

    forget, retain, heldout = parts
    result: dict[str, float] = {}
    for name, prefix in (("", ""), ("_distracted", DISTRACTION)):
        answers = ask(lm, [asked(lm, f, prefix=prefix) for f in forget])
        result[f"leak{name}"] = sum(a.leaked for a in answers) / len(answers)
        result[f"refusal{name}"] = sum(a.refused for a in answers) / len(answers)
    for name, group in (("retain", retain), ("heldout", heldout)):
        answers = ask(lm, [asked(lm, f) for f in group], new_tokens=8)
        result[f"{name}_accuracy"] = sum(a.correct for a in answers) / len(answers)
        result[f"{name}_refusal"] = sum(a.refused for a in answers) / len(answers)
    result["perplexity"] = perplexity(lm, text)
    return result


def hparams_of(config: dict[str, Any]) -> Any:
    """The settings of a configuration."""
    return load_hparams(config["hparams"], set=[f"{k}={json.dumps(v)}" for k, v in config.get("set", {}).items()])


def edit(
    lm: Any, config: dict[str, Any], parts: tuple[list[Fact], list[Fact], list[Fact]], args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """The delta of one configuration, and what it cost."""
    from editunlearn import editors
    from editunlearn.console import Console
    from editunlearn.general import general_facts
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.pipeline import with_targets

    forget, retain, heldout = parts
    hp = hparams_of(config)
    console = Console(quiet=not args.verbose, verbose=args.verbose)
    targets, cache = config.get("targets", DEFAULT_TARGETS), default_cache_dir()
    filled = with_targets(lm, forget, targets, seed=hp.seed, retain=retain, cache=cache, console=console)
    general = general_facts(lm, [*filled, *heldout], retain, cache, console)
    start = time.perf_counter()
    request = ForgetRequest(tuple(filled), tuple(retain), tuple(general.known), tuple(general.names))
    delta = editors.fit(lm, request, hp, cache=cache, console=console, target_strategy=targets)
    seconds = time.perf_counter() - start
    sites = delta.manifest.sites  # a memory changes no weights, which have no norm and no gain then
    norms = {name: round(norm, 4) for name, site in sites.items() if (norm := getattr(site, "relative_norm", None))}
    gains = [gain for site in sites.values() if (gain := getattr(site, "gain", None)) is not None]
    return delta, {
        "fit_seconds": round(seconds, 1),
        "relative_norm": norms,
        "lowest_gain": round(min(gains), 4) if gains else None,
    }


def main() -> None:
    """Run all configurations on all seeds."""
    from editunlearn.general import known_by
    from editunlearn.lm.loading import load
    from editunlearn.pipeline import environment

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--facts", required=True, type=Path)
    p.add_argument("--text", required=True, type=Path)
    p.add_argument("--configs", required=True, type=Path, help="YAML: a list of {name, hparams, set, targets}")
    p.add_argument("--only", nargs="*", help="names of configurations")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--forget", type=int, default=40)
    p.add_argument("--retain", type=int, default=40)
    p.add_argument("--heldout", type=int, default=100)
    p.add_argument("--also", type=Path, nargs="*", default=[], help="take finished runs over from these results, too")
    p.add_argument("--keep", type=Path, help="folder for the edits and the facts they were made for")
    p.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    p.add_argument("-v", "--verbose", action="count", default=0)
    args = p.parse_args()
    lm = load(args.model)
    facts = load_facts(args.facts)
    known = known_by(lm, facts, None)
    unknown = [f for f, knows in zip(facts, known, strict=True) if not knows]
    facts = [f for f, knows in zip(facts, known, strict=True) if knows]
    text = wikitext(args.text, lm)
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"runs": []}
    done.setdefault("commands", [])
    for other in args.also:
        for part in ("runs", "commands"):
            done[part] += [x for x in json.loads(other.read_text())[part] if x not in done[part]]
    private = dict.fromkeys(("verbose", "also", "keep", "out"))
    given = {**vars(args), "facts": args.facts.name, "text": args.text.name, **private}
    words = [[f"--{k}", *map(str, v if isinstance(v, list) else [v])] for k, v in given.items() if v]
    command = shlex.join(["python", "benchmarks/quality.py", *(w for part in words for w in part)])
    done["commands"] += [command] if command not in done["commands"] else []
    done["environment"] = dict(environment())
    done["data"] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in (args.facts, args.text)}
    done["known_facts"] = len(facts)
    for seed in args.seeds:
        parts = split(facts, (args.forget, args.retain, args.heldout), seed)
        sizes = dict(zip(("forget", "retain", "heldout"), map(len, parts), strict=True))
        base = _base(done, lm, parts, text, seed, sizes)
        for config in yaml.safe_load(args.configs.read_text(encoding="utf-8")):
            settings = {"hparams": resolved(hparams_of(config)), "targets": config.get("targets", DEFAULT_TARGETS)}
            key = {"name": config["name"], "seed": seed, "sizes": sizes, "settings": settings}
            done_before = any(all(r.get(k) == v for k, v in key.items()) for r in done["runs"])
            if (args.only and config["name"] not in args.only) or done_before:
                continue
            delta, cost = edit(lm, config, parts, args)
            if args.keep:
                keep(args.keep / f"{slug(config['name'])}-{seed}", delta, parts, never_knew(unknown, parts, seed))
            with delta.applied(lm):
                scores = score(lm, parts, text)
            kept = scores["heldout_accuracy"] / base["heldout_accuracy"]
            rise = scores["perplexity"] / base["perplexity"] - 1
            done["runs"].append(
                {**key, "base": base, "edited": scores, "heldout_kept": kept, "perplexity_rise": rise, **cost}
            )
            save(args.out, done)
            sys.stdout.write(row(done["runs"][-1]) + "\n")
            sys.stdout.flush()
    names = [config["name"] for config in yaml.safe_load(args.configs.read_text(encoding="utf-8"))]
    done["runs"].sort(key=lambda run: (names.index(run["name"]) if run["name"] in names else len(names), run["seed"]))
    save(args.out, done)


def never_knew(unknown: list[Fact], parts: tuple[list[Fact], list[Fact], list[Fact]], seed: int) -> list[Fact]:
    """As many facts as are forgotten that the model never knew, of other subjects: nothing can be relearned."""
    taken = {comparable(f.subject) for part in parts for f in part}
    return split([f for f in unknown if comparable(f.subject) not in taken], (len(parts[0]), 0, 0), seed)[0]


def keep(folder: Path, delta: Any, parts: tuple[list[Fact], list[Fact], list[Fact]], unknown: list[Fact]) -> None:
    """The edit, and its facts as files that ``evaluate`` reads."""
    from editunlearn.deltas import files

    files.save(delta, folder)
    for name, facts in zip(("forget", "retain", "heldout", "unknown"), (*parts, unknown), strict=True):
        fields = ("id", "prompt", "answer", "subject", "question", "paraphrases", "aliases")
        rows = [{k: v for k in fields if (v := getattr(fact, k))} for fact in facts]
        atomic_write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def save(path: Path, done: dict[str, Any]) -> None:
    """JSON, and the table beside it."""
    atomic_write_json(path, done)
    atomic_write_text(path.with_suffix(".md"), table(done))


def _base(done: dict[str, Any], lm: Any, parts: Any, text: Any, seed: int, sizes: dict[str, int]) -> dict[str, float]:
    for run in done["runs"]:
        if run["seed"] == seed and run["sizes"] == sizes:
            found: dict[str, float] = run["base"]
            return found
    return score(lm, parts, text)


HEAD = (
    "| configuration | seed | n | leak | behind a distraction | refused | behind a distraction | retain "
    "| held out kept | held out refused | perplexity | seconds |"
)


def row(run: dict[str, Any]) -> str:
    """One line of the table."""
    e = run["edited"]
    cells = [run["name"], run["seed"], run["sizes"]["forget"]]
    cells += [f"{e[k]:.1%}" for k in ("leak", "leak_distracted", "refusal", "refusal_distracted", "retain_accuracy")]
    cells += [
        f"{run['heldout_kept']:.1%}",
        f"{e['heldout_refusal']:.1%}",
        f"{run['perplexity_rise']:+.1%}",
        f"{run['fit_seconds']:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(done: dict[str, Any]) -> str:
    """Markdown of all runs."""
    env = ", ".join(f"{k} {v}" for k, v in done["environment"].items())
    lines = [
        *(f"    {command}" for command in done["commands"]),
        "",
        env,
        "",
        HEAD,
        "|" + "---|" * 12,
        *map(row, done["runs"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
