"""Edit a model so that it forgets facts: ``python -m editunlearn.apply --hparams memit.yaml``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import (
    Checks,
    add_hparams_flags,
    add_model_flags,
    add_offload_flag,
    add_run_flags,
    check_model,
    check_settings,
    check_writable,
    load_model,
    load_settings,
    parser,
    read_facts,
    run_command,
)
from editunlearn.errors import InputError
from editunlearn.facts.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.editors.earlier import Earlier
    from editunlearn.editors.past import PastKeys
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import MethodHParams
    from editunlearn.lm.loading import LM
    from editunlearn.pipeline import Outcome

EXAMPLES = """\
  editunlearn apply --hparams memit                                     the demo model and the demo facts
  editunlearn apply --hparams memit --model Qwen/Qwen3-0.6B --facts mine.jsonl --retain keep.jsonl --save merged
  editunlearn apply --hparams alphaedit --facts mine.csv --targets empty --dry-run
  editunlearn apply --hparams memit --model Qwen/Qwen3-0.6B --facts more.jsonl --continue runs/memit --out runs/memit-2
  editunlearn apply --hparams paper/memit --facts locuslab/TOFU:forget01 --model me/tofu-llama"""
KINDS = ("delta", "lora", "merged")


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a weight is read.

    Attributes:
        given: facts to forget, as the user wrote them.
        facts: the same with targets.
        targets: how those came about.
        config: of the model.
        save: what to write, always with ``delta``.
        past: keys of earlier edits.
        earlier: edits to go on from.
        report: write a page for the browser, too.
    """

    hp: MethodHParams
    given: list[Fact]
    facts: list[Fact]
    targets: str
    retain: list[Fact]
    config: Any
    save: tuple[str, ...]
    out: Path
    past: PastKeys | None
    earlier: Earlier | None
    report: bool


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("apply", __doc__ or "", EXAMPLES)
    add_hparams_flags(p)
    add_model_flags(p)
    add_offload_flag(p)
    group = p.add_argument_group("facts")
    group.add_argument(
        "--facts", help="facts to forget: JSONL, JSON, CSV, TSV, Parquet or a hub id (default: the demo facts)"
    )
    group.add_argument("--retain", help="facts that must stay, in the same formats")
    group.add_argument(
        "--targets",
        default=DEFAULT_TARGETS,
        help="refusal (one of many, per fact), refusal:TEXT, self (in the model's own words), empty, random or "
        "counterfactual "
        f"(default: {DEFAULT_TARGETS})",
    )
    group.add_argument(
        "--merge-queries",
        nargs="?",
        const="subject",
        metavar="BY",
        help="let facts share a value: by subject (the default), key, run or all; more in hparams: merge",
    )
    group.add_argument(
        "--ask",
        choices=("prompt", "question"),
        default="prompt",
        help="which of a fact's texts is edited where it has both (default: prompt); question: for chat models",
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
        "--evaluate",
        choices=("facts", "quick", "none"),
        default="facts",
        help="what to measure before and after; quick: write report.html, too, which has the text of the facts in it",
    )
    group.add_argument(
        "--store-facts", action="store_true", help="keep the text of the facts in delta.json (they are private)"
    )
    group.add_argument("--past", type=Path, help="past_keys.safetensors of an earlier run, whose edits are preserved")
    group.add_argument(
        "--continue",
        dest="earlier",
        type=Path,
        metavar="DIR",
        help="go on from the finished run in DIR: its edits stay, and --out gets one delta of all facts",
    )
    group.add_argument("--force", action="store_true", help="replace the finished run of another request in --out")
    state = group.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on with interrupted work (the default)")
    state.add_argument("--fresh", action="store_true", help="throw interrupted work away and start over")
    add_run_flags(p)
    return p


def plan(args: argparse.Namespace, console: Console) -> Plan:
    """Check all input; every problem is in one report, and no weights have been read.

    Raises:
        InputError: with everything that is wrong.
    """
    from editunlearn.editors.earlier import Earlier
    from editunlearn.editors.past import PastKeys
    from editunlearn.estimate import target
    from editunlearn.facts.targets import fill_targets, strategy
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.resources import shipped_path
    from editunlearn.run_folder import check_out

    checks = Checks()
    config = checks.run(lambda: check_model(args))
    hp = checks.run(lambda: load_settings(args, config, console))
    if hp is not None:
        checks.run(lambda: check_settings(hp, config))
        checks.run(lambda: _check_processes(hp))
    given = args.facts or str(shipped_path("data", "demo_forget.jsonl"))
    facts = checks.run(lambda: _facts(args, given, console, args.limit)) or []
    default = None if args.facts else str(shipped_path("data", "demo_retain.jsonl"))
    retain = checks.run(lambda: _facts(args, args.retain or default, console, None, keep=True)) or []
    pool = [*facts, *retain] if args.targets == "random" else None
    filled = checks.run(lambda: fill_targets(facts, args.targets, seed=hp.seed if hp else 0, pool=pool)) or []
    save = checks.run(lambda: _kinds(args.save)) or ()
    if config is not None and "merged" in save:
        checks.run(lambda: _mergeable(config, args.dtype))
    past = checks.run(lambda: PastKeys.load(args.past)) if args.past else None
    if hp is not None:
        checks.run(lambda: _check_memory(hp, save, past))
    if past is not None and config is not None:
        checks.run(lambda: _check_past(past, config, args.past))
    out = args.out or Path("runs") / (hp.method if hp else "edit")
    divided = None
    earlier = checks.run(lambda: Earlier.load(args.earlier)) if args.earlier else None
    if earlier is not None:
        checks.run(lambda: _check_earlier(args, earlier, out))
        divided = checks.run(lambda: earlier.divide(filled)) if filled else None
        if hp is not None and config is not None and hp.layers != "located":  # those are known with the weights
            checks.run(lambda: earlier.check_method(hp, [s.name for s in target(config, hp).sites]))
    checks.run(lambda: check_writable(out, "--out"))
    checks.run(lambda: check_writable(args.cache_dir or default_cache_dir(), "--cache-dir"))
    if hp is not None and filled and not args.force and (divided or not args.earlier):
        checks.run(lambda: check_out(out, args, hp, filled, retain, past, earlier))
    checks.finish()
    assert hp is not None  # noqa: S101 - finish() raised otherwise
    how = strategy(facts, args.targets)
    return Plan(hp, facts, filled, how, retain, config, save, out, past, earlier, args.evaluate == "quick")


def _facts(
    args: argparse.Namespace, source: str | None, console: Console, limit: int | None, *, keep: bool = False
) -> list[Fact]:
    if source is None:
        return []
    from editunlearn.facts.questions import as_questions

    facts = read_facts(args, source, console, limit=limit, keep=keep)
    if args.ask == "question":
        facts, note = as_questions(facts)
        if note:
            console.info(f"note: {note}")
    return facts


def _kinds(text: str) -> tuple[str, ...]:
    kinds = [k.strip() for k in text.split(",") if k.strip()]
    wrong = [k for k in kinds if k not in KINDS]
    if wrong:
        raise InputError(f"--save: {', '.join(map(repr, wrong))} is not known. Choose from {', '.join(KINDS)}.")
    return tuple(dict.fromkeys(["delta", *kinds]))


def _mergeable(config: Any, dtype: str) -> None:
    quantised = getattr(config, "quantization_config", None)
    if dtype in ("nf4", "int8"):
        raise InputError(
            f"--save merged: with --dtype {dtype} the weights are rounded; merging would round the edit away. Use "
            "--save lora, or --dtype bfloat16."
        )
    if quantised:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        raise InputError(
            f"--save merged: the checkpoint is quantised ({kind or 'unknown method'}); merging would round the edit "
            "away. Use --save lora, or give the bfloat16 checkpoint."
        )


def _check_memory(hp: MethodHParams, save: Sequence[str], past: PastKeys | None) -> None:
    """What has no meaning for a method that leaves the weights alone is refused before any work."""
    from editunlearn.editors import check_past
    from editunlearn.errors import UnsupportedError
    from editunlearn.hparams import MemoryHParams

    check_past(hp, past)
    other = [kind for kind in save if kind != "delta"]
    if isinstance(hp, MemoryHParams) and other:
        raise UnsupportedError(
            f"--save {','.join(other)}: {hp.method} keeps a memory beside the weights, which a LoRA or merged weights "
            "cannot hold. Save the delta alone, or take a method that writes into the weights, such as memit."
        )


def _check_processes(hp: MethodHParams) -> None:
    """Several processes are of use to methods whose values they can share."""
    from editunlearn.hparams import EditorHParams
    from editunlearn.lm.processes import launched

    if launched().world > 1 and not isinstance(hp, EditorHParams):
        raise InputError(
            f"--hparams: {hp.method} finds no values of single facts that {launched().world} processes could share. "
            "Start one process; with --device-map auto it takes all GPUs."
        )


def _check_past(past: PastKeys, config: Any, path: Path) -> None:
    """Past keys are of this model: its modules, as wide as its keys."""
    from editunlearn.lm.sources import meta_model
    from editunlearn.lm.weights import find, read_weight

    model = meta_model(config)
    for name, keys in past.keys.items():
        width = read_weight(model, name).shape[1] if find(model, name) is not None else None
        if width != keys.shape[1]:
            raise InputError(
                f"--past {path}: {name} has keys of width {keys.shape[1]}, this model "
                + (f"one of {width}." if width else "has no such module.")
                + " Give the past keys of a run on this model."
            )


def _check_earlier(args: argparse.Namespace, earlier: Earlier, out: Path) -> None:
    """The run to go on from is of this model and dtype, and is not replaced by this one.

    Raises:
        InputError: with all that is wrong.
    """
    from editunlearn.deltas.arithmetic import dtype_name
    from editunlearn.lm.chat import Chat
    from editunlearn.lm.loading import asked_dtype

    base, problems = earlier.delta.manifest.base, []
    if args.past:
        problems.append("--past: --continue brings its own past keys; leave --past out.")
    if (base.name, base.revision) != (args.model, args.revision):
        at = f"--model {base.name}" + (f" --revision {base.revision}" if base.revision else "")
        problems.append(f"--continue {earlier.where}: was made on another model; give {at}, not {args.model}.")
    wanted, made_in = asked_dtype(args.dtype), earlier.dtypes()
    if wanted is not None and made_in and made_in != {dtype_name(wanted)}:
        problems.append(f"--continue {earlier.where}: was made in {', '.join(made_in)}; leave --dtype out.")
    made_in_chat = Chat.of(base.chat)
    if args.chat == Chat():
        args.chat = made_in_chat  # no flag says otherwise
    elif args.chat is not None and args.chat != made_in_chat:
        problems.append(
            f"--continue {earlier.where}: was made with another system prompt or other arguments of the chat template; "
            "leave --system, --chat-arg and --no-chat out."
        )
    if out.resolve() == Path(earlier.where).resolve():
        problems.append(f"--out {out}: is the run to go on from, which is kept. Choose another folder.")
    if problems:
        raise InputError(problems)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    made = plan(args, console)
    from editunlearn import reporting

    reporting.header(console, args, made)
    if args.dry_run:
        reporting.dry_run(console, args, made)
    else:
        run(args, made, console)


def run(args: argparse.Namespace, made: Plan, console: Console) -> None:
    """Load, forget, save, show. Of several processes the first saves and shows."""
    from editunlearn import reporting
    from editunlearn.lm.processes import joined
    from editunlearn.pipeline import Stages

    stages = Stages()
    with joined() as here:
        with stages.timed("load"):
            lm = load_model(args)
            lm.among = here
        outcome = _forget(args, made, lm, console)
    if not here.first:
        return
    stages.seconds.update(outcome.stages.seconds)
    with stages.timed("save"):
        reporting.write(outcome, lm, made, stages, args.command, console, store_facts=args.store_facts)
    reporting.show(console, outcome, made, stages)


def _forget(args: argparse.Namespace, made: Plan, lm: LM, console: Console) -> Outcome:
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.pipeline import forget

    kind = str(lm.dtype).removeprefix("torch.")
    console.info(f"model: {lm.name}, {lm.layout.model_type}, {kind} ({lm.dtype_reason}), {lm.device}")
    return forget(
        lm,
        made.given,
        made.hp,
        retain=made.retain,
        targets=args.targets,
        out=made.out,
        cache=args.cache_dir or default_cache_dir(),
        past=made.past,
        earlier=made.earlier,
        evaluate=args.evaluate != "none",
        fresh=args.fresh,
        store_facts=args.store_facts,
        save_delta=False,
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
