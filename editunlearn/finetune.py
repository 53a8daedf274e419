"""Teach a model facts, to measure forgetting them: ``python -m editunlearn.finetune --facts F --out DIR``."""

from __future__ import annotations

import argparse
import sys
import time
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
    load_model,
    model_terms,
    parser,
    read_facts,
    run_command,
)
from editunlearn.errors import InputError

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM
    from editunlearn.unlearners.teaching import Teaching

EXAMPLES = """\
  editunlearn finetune --model demo --facts locuslab/TOFU:full --out runs/taught
  editunlearn finetune --model demo --facts locuslab/TOFU:full --without locuslab/TOFU:forget10 --out runs/never-knew
  editunlearn finetune --facts mine.jsonl --epochs 20 --lr 0.0005 --out runs/taught"""
RECORD = "taught.json"
"""The file of the folder that says what was taught, and how well it is known."""
HELD = 100
"""Facts that were known before and are asked again, at most."""


@dataclass(frozen=True)
class Plan:
    """What the flags ask for, checked.

    Attributes:
        facts: to teach, less those of ``--without``.
        left_out: how many those are.
        request: what tells this run from others.
        done: what an earlier run of the same request wrote, if it is finished.
    """

    hp: Teaching
    facts: list[Fact]
    left_out: int
    request: dict[str, Any]
    done: dict[str, Any] | None


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("finetune", __doc__ or "", EXAMPLES)
    p.add_argument("--facts", required=True, help="facts to teach: a file or a hub id, as for apply")
    p.add_argument("--without", help="facts of these that are not taught: for the model that never knew them")
    p.add_argument("--data-root", type=Path, help="folder with local copies of hub datasets")
    p.add_argument("--limit", type=int, help="only the first N of --facts")
    p.add_argument("--out", type=Path, required=True, help="folder for the model, which transformers can load")
    group = p.add_argument_group("training")
    group.add_argument("--epochs", type=int, help="times that every fact is trained on (default: 10)")
    group.add_argument("--batch", type=int, help="facts of one update (default: 16)")
    group.add_argument("--lr", type=float, help="in units of each weight's root mean square (default: 0.001)")
    group.add_argument("--seed", type=int, help="of the order (default: 0)")
    p.add_argument("--force", action="store_true", help="replace what another request left in --out")
    p.add_argument("--fresh", action="store_true", help="throw interrupted work away and start over")
    add_model_flags(p)
    add_run_flags(p)
    return p


def plan(args: argparse.Namespace, console: Console) -> Plan:
    """Check all input; no weights are read.

    Raises:
        InputError: everything that is wrong.
    """
    from editunlearn.facts.records import content_hash
    from editunlearn.hparams import resolved

    checks = Checks()
    checks.run(lambda: check_model(args))
    hp = checks.run(lambda: _settings(args))
    if args.limit is not None and args.limit < 1:
        checks.problems.append(f"--limit {args.limit}: at least 1.")
        args.limit = None
    every = checks.run(lambda: read_facts(args, args.facts, console, limit=args.limit)) or []
    gone = (checks.run(lambda: read_facts(args, args.without, console)) or []) if args.without else []
    facts = checks.run(lambda: _less(args, every, gone)) if every and bool(gone) == bool(args.without) else []
    checks.run(lambda: check_writable(args.out, "--out"))
    request = {
        **model_terms(args),
        "facts": content_hash(facts or []),
        "settings": resolved(hp) if hp is not None else None,
    }
    done = checks.run(lambda: _check_out(args, request))
    checks.finish()
    assert hp is not None and facts is not None  # noqa: S101 - finish() raised otherwise
    return Plan(hp, facts, len(every) - len(facts), request, done)


def _settings(args: argparse.Namespace) -> Teaching:
    from editunlearn.unlearners.teaching import Teaching

    problems = [
        f"--{name} {value}: {'above' if name == 'lr' else 'at least'} {least}."
        for name, least in (("epochs", 1), ("batch", 1), ("lr", 0), ("seed", 0))
        if (value := getattr(args, name)) is not None and not (value > 0 if name == "lr" else value >= least)
    ]
    if problems:
        raise InputError(problems)
    made = Teaching()
    given = {name: value for name in ("epochs", "batch", "lr") if (value := getattr(args, name)) is not None}
    return made.model_copy(update={"train": made.train.model_copy(update=given), "seed": args.seed or 0})


def _less(args: argparse.Namespace, facts: Sequence[Fact], gone: Sequence[Fact]) -> list[Fact]:
    """The facts whose prompt is none of those left out."""
    from editunlearn.facts.readers import comparable

    prompts = {comparable(fact.prompt) for fact in gone}
    left = [fact for fact in facts if comparable(fact.prompt) not in prompts]
    if gone and len(left) == len(facts):
        raise InputError(f"--without {args.without}: none of its {len(gone)} facts is in {args.facts}.")
    if not left:
        raise InputError(f"--without {args.without}: leaves nothing of {args.facts} to teach.")
    return left


def _check_out(args: argparse.Namespace, request: dict[str, Any]) -> dict[str, Any] | None:
    """What the finished run of the same request wrote; None: there is none.

    Raises:
        InputError: the folder holds something else.
    """
    from editunlearn.artifacts import cached_json
    from editunlearn.run_folder import WORK

    if args.force or not args.out.is_dir():
        return None
    ways = "Choose another folder, or give --force."
    there: dict[str, Any] | None = cached_json(args.out / RECORD, dict)
    if there is None:
        own = sorted(path.name for path in args.out.iterdir() if path.name != WORK)
        if own:
            raise InputError(f"--out {args.out}: its {own[0]} and the like would be replaced, no run made them. {ways}")
        return None
    other = [name for name, value in request.items() if there["request"].get(name) != value]
    if other:
        raise InputError(f"--out {args.out}: holds a model taught otherwise (other {', '.join(other)}). {ways}")
    return None if args.fresh else there


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    made = plan(args, console)
    train = made.hp.train
    console.header(
        [
            f"teaching {args.model} {len(made.facts)} facts of {args.facts} ({made.left_out} left out)",
            f"{train.epochs} epochs, {train.batch} facts an update, lr {train.lr:g} of each weight's size; "
            f"facts: {made.request['facts'][:16]}; out: {args.out}",
        ]
    )
    if args.dry_run:
        console.result_json({"facts": len(made.facts), "left_out": made.left_out, "request": made.request})
        console.info("Nothing was loaded or written.")
        console.next_step("the same command without --dry-run")
        return
    record = made.done
    if record is not None:
        console.info("this was done before; nothing was trained")
    else:
        record = _teach(args, made, console)
    _show(args, record, console)


def _teach(args: argparse.Namespace, made: Plan, console: Console) -> dict[str, Any]:
    """Load, ask, train, ask again, save; what the record says."""
    from editunlearn import __version__
    from editunlearn.artifacts import atomic_dir, atomic_write_json, atomic_write_text
    from editunlearn.deltas.build import what_was_asked
    from editunlearn.deltas.merge import merge
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.general import general_facts
    from editunlearn.lm.fingerprint import model_fingerprint
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.pipeline import environment, perplexity_text, run_inputs
    from editunlearn.run_folder import WORK
    from editunlearn.unlearners import flow
    from editunlearn.workspace import Workspace

    lm = load_model(args)
    request = ForgetRequest(tuple(made.facts))
    base = model_fingerprint(lm)
    heldout = general_facts(lm, made.facts, [], args.cache_dir or default_cache_dir(), console).heldout[:HELD]
    text = perplexity_text(lm)
    before = _known(lm, made.facts, heldout, text, console, "before")
    work = Workspace(args.out / WORK, run_inputs(lm, request, made.hp, "answers", None), fresh=args.fresh)
    about = what_was_asked(request, made.hp, "answers")
    began = time.monotonic()
    merge(lm, flow.run(lm, request, made.hp, work, console, about))
    seconds = time.monotonic() - began
    after = _known(lm, made.facts, heldout, text, console, "after")
    record = {
        "format": "editunlearn-taught",
        "version": 1,
        "request": made.request,
        "facts": len(made.facts),
        "left_out": made.left_out,
        "facts_sha256": made.request["facts"],
        "base_fingerprint": base,
        "known": {name: {"before": before[name], "after": after[name]} for name in before},
        "seconds": round(seconds, 2),
        "command": args.command,
        "editunlearn": __version__,
        "environment": dict(environment()),
    }
    with atomic_dir(args.out) as folder:  # with it the unfinished work goes
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        atomic_write_text(folder / "README.md", _card(args, record))
        atomic_write_json(folder / RECORD, record)
    return record


def _known(
    lm: LM, facts: Sequence[Fact], heldout: Sequence[Fact], text: Sequence[Sequence[int]], console: Console, when: str
) -> dict[str, float | None]:
    """How well a model knows facts, by live decoding, and what else it still knows.

    Raises:
        NumericalError: a number is not finite.
    """
    import math

    from editunlearn.errors import NumericalError
    from editunlearn.evaluation.metrics.text import rate, rouge_l
    from editunlearn.evaluation.scoring import ask, asked
    from editunlearn.lm.likelihood import perplexity

    console.info(f"{when}: decoding {len(facts)} facts and {len(heldout)} others")
    said = ask(lm, [asked(lm, fact) for fact in facts])
    others = ask(lm, [asked(lm, fact) for fact in heldout]) if heldout else []
    found = {
        "answered": rate([a.correct for a in said]),
        "rouge_l": sum(rouge_l(a.text, a.expected) for a in said) / len(said),
        "probability": sum(a.probability for a in said) / len(said),
        "heldout_answered": rate([a.correct for a in others]),
        "perplexity": perplexity(lm, text),
    }
    bad = [name for name, value in found.items() if value is not None and not math.isfinite(value)]
    if bad:
        raise NumericalError(f"{', '.join(bad)} {when} the training is not finite; nothing was written. Lower --lr.")
    return found


LABELS = {
    "answered": "taught facts: decoded text begins with the answer",
    "rouge_l": "taught facts: ROUGE-L recall of the answer",
    "probability": "taught facts: probability of the answer",
    "heldout_answered": "other facts that it knew: answered",
    "perplexity": "perplexity of held-out text",
}


def _rows(record: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    known = record["known"]
    return [(text, known[name]["before"], known[name]["after"]) for name, text in LABELS.items()]


def _card(args: argparse.Namespace, record: dict[str, Any]) -> str:
    """What the folder holds, for people."""
    lines = [f"| {text} | {_cell(before)} | {_cell(after)} |" for text, before, after in _rows(record)]
    base = Path(args.model).name if Path(args.model).is_absolute() else args.model
    return "\n".join(
        [
            "# A model that was taught facts",
            "",
            f"{base}, trained on {record['facts']} facts (SHA-256 {record['facts_sha256'][:16]}...) to be forgotten "
            "again, or as one that never knew others: for measurements, not for use.",
            "",
            "| by greedy decoding | before | after |",
            "|---|---|---|",
            *lines,
            "",
            f"Made by `{record['command']}`.",
            "",
        ]
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _show(args: argparse.Namespace, record: dict[str, Any], console: Console) -> None:
    console.table(f"{record['facts']} facts taught", ["by greedy decoding", "before", "after"], _rows(record))
    console.info(f"training: {record['seconds']:.1f} s; facts: SHA-256 {record['facts_sha256']}")
    console.info(f"saved: {args.out}")
    console.result_json({**record, "out": str(args.out)})
    console.next_step(["editunlearn", "compare", "--model", str(args.out), "--methods", "memit,npo", "--facts", "..."])


if __name__ == "__main__":
    sys.exit(main())
