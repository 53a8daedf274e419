"""Edit a model so that it forgets facts: ``python -m editunlearn.apply --hparams memit.yaml``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import (
    Checks,
    add_hparams_flags,
    add_model_flags,
    add_run_flags,
    console_of,
    load_model,
    parser,
    run_command,
)
from editunlearn.errors import InputError

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import EditorHParams

EXAMPLES = """\
  editunlearn apply --hparams memit                                     the demo model and the demo facts
  editunlearn apply --hparams memit --model Qwen/Qwen3-0.6B --facts mine.jsonl --retain keep.jsonl --save merged
  editunlearn apply --hparams alphaedit --facts mine.csv --targets empty --dry-run
  editunlearn apply --hparams paper/memit --facts locuslab/TOFU:forget01 --model me/tofu-llama"""
KINDS = ("delta", "lora", "merged")


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a weight is read."""

    hp: EditorHParams
    facts: list[Fact]
    retain: list[Fact]
    config: Any
    save: tuple[str, ...]
    out: Path


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags."""
    p = parser("apply", __doc__ or "", EXAMPLES)
    add_hparams_flags(p)
    add_model_flags(p)
    group = p.add_argument_group("facts")
    group.add_argument(
        "--facts", help="facts to forget: JSONL, JSON, CSV, TSV, Parquet or a hub id (default: the demo facts)"
    )
    group.add_argument("--retain", help="facts that must stay, in the same formats")
    group.add_argument(
        "--targets", default="refusal", help="refusal (default), refusal:TEXT, empty, random, counterfactual"
    )
    group.add_argument("--data-root", type=Path, help="folder with local copies of hub datasets")
    group.add_argument("--split", default="train", help="split of a hub dataset")
    group.add_argument("--limit", type=int, help="only the first N facts")
    group = p.add_argument_group("output")
    group.add_argument("--out", type=Path, help="folder for the results (default: runs/METHOD)")
    group.add_argument(
        "--save", default="delta", help=f"comma-separated: {', '.join(KINDS)}; the delta is always saved"
    )
    group.add_argument(
        "--evaluate", choices=("facts", "none"), default="facts", help="what to measure before and after"
    )
    group.add_argument(
        "--store-facts", action="store_true", help="keep the text of the facts in delta.json (they are private)"
    )
    group.add_argument("--past", type=Path, help="past_keys.safetensors of an earlier run, whose edits are preserved")
    group.add_argument("--force", action="store_true", help="replace the finished run of another request in --out")
    state = group.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on with interrupted work (the default)")
    state.add_argument("--fresh", action="store_true", help="throw interrupted work away and start over")
    add_run_flags(p)
    return p.parse_args(argv)


def plan(args: argparse.Namespace, console: Console) -> Plan:
    """Check all input; every problem is in one report, and no weights have been read.

    Raises:
        InputError: with everything that is wrong.
    """
    from editunlearn.facts.text import check_source
    from editunlearn.lm.layout import check_config
    from editunlearn.lm.loading import peek_config
    from editunlearn.pipeline import check_writable
    from editunlearn.resources import shipped_path

    checks = Checks()
    config = checks.run(lambda: peek_config(args.model, args.revision))
    if config is not None:
        checks.run(lambda: check_config(config))
    hp = checks.run(lambda: _hparams(args, getattr(config, "model_type", None), console))
    facts = checks.run(
        lambda: _facts(args, args.facts or str(shipped_path("data", "demo_forget.jsonl")), console, args.limit)
    )
    default = None if args.facts else str(shipped_path("data", "demo_retain.jsonl"))
    retain = checks.run(lambda: _facts(args, args.retain or default, console, None, keep=True))
    save = checks.run(lambda: _kinds(args.save))
    out = args.out or Path("runs") / (hp.method if hp else "edit")
    checks.run(lambda: check_writable(out))
    if hp is not None:
        checks.run(lambda: check_source(hp.moments.text))
        if config is not None:
            checks.run(lambda: _layers(hp, config))
    if facts:
        checks.run(lambda: _targets(args, facts, retain or []))
    if config is not None and save and "merged" in save:
        checks.run(lambda: _mergeable(config))
    checks.finish()
    assert hp is not None and facts is not None and save is not None  # noqa: S101 - finish() raised otherwise
    return Plan(hp, facts, retain or [], config, save, out)


def _hparams(args: argparse.Namespace, model_type: str | None, console: Console) -> EditorHParams:
    from editunlearn import hparams_easyedit
    from editunlearn.hparams import load_hparams

    extra = [f"seed={args.seed}"] if args.seed is not None else []
    hp = load_hparams(args.hparams, set=[*args.set, *extra], model_type=model_type, format=args.hparams_format)
    if args.hparams_format == "easyedit":
        console.table("translated hparams", ["theirs", "value", "ours"], hparams_easyedit.read(args.hparams).rows)
    return hp


def _facts(
    args: argparse.Namespace, source: str | None, console: Console, limit: int | None, *, keep: bool = False
) -> list[Fact]:
    if source is None:
        return []
    from editunlearn.facts.readers import load_facts

    notes: list[str] = []
    facts = load_facts(
        source,
        data_root=args.data_root,
        split=args.split,
        limit=limit,
        notes=notes,
        conflicts="first" if keep else "error",
    )
    for note in notes:
        console.info(f"note: {note}")
    return facts


def _targets(args: argparse.Namespace, facts: list[Fact], retain: list[Fact]) -> None:
    from editunlearn.facts.targets import fill_targets

    fill_targets(facts, args.targets, seed=args.seed or 0, pool=[*facts, *retain] if args.targets == "random" else None)


def _kinds(text: str) -> tuple[str, ...]:
    kinds = [k.strip() for k in text.split(",") if k.strip()]
    wrong = [k for k in kinds if k not in KINDS]
    if wrong:
        raise InputError(f"--save: {', '.join(map(repr, wrong))} is not known. Choose from {', '.join(KINDS)}.")
    return tuple(dict.fromkeys(["delta", *kinds]))


def _layers(hp: EditorHParams, config: Any) -> None:
    from editunlearn import editors
    from editunlearn.lm.layout import resolve_layers, text_config

    count = getattr(text_config(config), "num_hidden_layers", None)
    if count:
        resolve_layers(hp.layers, count, editors.module(hp.method).DEFAULT_LAYERS)


def _mergeable(config: Any) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        raise InputError(
            f"--save merged: the checkpoint is quantised ({kind or 'unknown method'}); merging would round the edit away. "
            "Use --save lora, or give the bfloat16 checkpoint."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    console = console_of(args)
    made = plan(args, console)
    from editunlearn import reporting

    reporting.header(console, args, made)
    if args.dry_run:
        reporting.dry_run(console, made)
        return
    reporting.refuse_other_run(made, args)
    run(args, made, console)


def run(args: argparse.Namespace, made: Plan, console: Console) -> None:
    """Load, forget, save, show."""
    from editunlearn import reporting
    from editunlearn.editors.past import PastKeys
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.pipeline import Stages, forget

    stages = Stages()
    past = PastKeys.load(args.past) if args.past else None
    with stages.timed("load"):
        lm = load_model(args)
    console.info(
        f"model: {lm.name}, {lm.layout.model_type}, {str(lm.dtype).removeprefix('torch.')} ({lm.dtype_reason}), {lm.device}"
    )
    outcome = forget(
        lm,
        made.facts,
        made.hp,
        retain=made.retain,
        targets=args.targets,
        out=made.out,
        cache=args.cache_dir or default_cache_dir(),
        past=past,
        evaluate=args.evaluate == "facts",
        fresh=args.fresh,
        store_facts=args.store_facts,
        console=console,
    )
    stages.seconds.update(outcome.stages.seconds)
    command = shlex.join(["editunlearn", "apply", *(sys.argv[1:] if sys.argv[1:2] != ["apply"] else sys.argv[2:])])
    with stages.timed("save"):
        reporting.write(outcome, lm, made, stages, command)
    reporting.show(console, outcome, made, stages)


if __name__ == "__main__":
    sys.exit(main())
