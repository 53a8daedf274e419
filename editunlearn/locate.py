"""Find the states that carry facts, by causal tracing: ``python -m editunlearn.locate --model M --facts F``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import (
    Checks,
    add_hparams_flags,
    add_model_flags,
    add_run_flags,
    check_model,
    check_settings,
    check_writable,
    load_model,
    load_settings,
    parser,
    run_command,
)
from editunlearn.errors import InputError

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import EditorHParams, MethodHParams
    from editunlearn.lm.loading import LM
    from editunlearn.tracing.effects import Effects, Settings
    from editunlearn.tracing.states import Kind

KINDS: tuple[Kind, ...] = ("block", "mlp", "attention")
FILE = "locate.json"
WINDOW_SHARE = 10 / 48
"""Window of MLPs and attentions as a share of the blocks: 10 of GPT-2 XL's 48, as published."""
EXAMPLES = """\
  editunlearn locate                                             the demo model, 50 shipped facts that it knows
  editunlearn locate --model Qwen/Qwen3-0.6B --facts known.json --count 100 --severed
  editunlearn locate --model big/model --fast                    by gradient alone: seconds instead of minutes
  editunlearn locate --facts forget.jsonl --sweep --hparams memit   edit with each block by itself, and measure"""


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("locate", __doc__ or "", EXAMPLES)
    add_model_flags(p)
    group = p.add_argument_group("facts")
    group.add_argument("--facts", help="facts to trace, in the formats of apply (default: shipped everyday facts)")
    group.add_argument("--data-root", type=Path, help="folder with local copies of hub datasets")
    group.add_argument("--count", type=int, default=50, help="so many facts that the model knows (default: 50)")
    group = p.add_argument_group("tracing")
    group.add_argument(
        "--noise", type=float, default=3.0, help="noise on the subject, in standard deviations (default: 3)"
    )
    group.add_argument("--samples", type=int, default=10, help="draws of the noise (default: 10)")
    group.add_argument(
        "--window", type=int, help="blocks whose MLPs, or attentions, are restored together (default: by depth)"
    )
    group.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is restored")
    group.add_argument("--severed", action="store_true", help="also with the paths through later MLPs, attentions cut")
    group.add_argument("--fast", action="store_true", help="estimate by gradient only, restore nothing")
    group.add_argument("--batch-tokens", type=int, default=4096, help="tokens of one pass, about (default: 4096)")
    group = p.add_argument_group("sweep")
    group.add_argument(
        "--sweep", action="store_true", help="also edit with each block by itself, and measure: tracing does not tell"
    )
    group.add_argument("--layers", type=int, nargs="+", help="blocks to edit with (default: all)")
    add_hparams_flags(p, "memit")
    group = p.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path("runs/locate"), help="folder (default: runs/locate)")
    group.add_argument("--no-figure", action="store_true", help="no locate.svg and locate.png (they need matplotlib)")
    state = group.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on with interrupted work (the default)")
    state.add_argument("--fresh", action="store_true", help="trace anew even what is done")
    add_run_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    facts, hp, blocks = _checked(args, console)
    window = args.window or max(1, round(WINDOW_SHARE * blocks))
    console.header(
        [
            f"tracing {args.model}: {args.count} known facts of {len(facts)} given, {', '.join(args.kinds)}",
            f"noise: {args.noise:g} standard deviations, {args.samples} draws; window: {window} of {blocks} blocks "
            + ("(given)" if args.window else "(by depth)"),
        ]
    )
    if args.dry_run:
        _dry_run(console, args, facts, blocks)
        return
    _run(args, facts, hp, window, console)


def _checked(args: argparse.Namespace, console: Console) -> tuple[list[Fact], MethodHParams | None, int]:
    """Facts, what the sweep edits with, and the number of blocks; no weights have been read.

    Raises:
        InputError: everything that is wrong.
    """
    from editunlearn.lm.configs import text_config
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.tracing import figures
    from editunlearn.tracing.prompts import facts_to_trace

    checks = Checks()
    config = checks.run(lambda: check_model(args))
    facts = checks.run(lambda: facts_to_trace(args.facts, args.data_root)) or []
    blocks = int(getattr(text_config(config), "num_hidden_layers", 0)) if config is not None else 0
    checks.run(lambda: _check_numbers(args, blocks))
    hp = None
    if args.sweep:
        hp = checks.run(lambda: _editor(load_settings(args, config, console)))
        if hp is not None:
            checks.run(lambda: check_settings(hp, config, args.layers))
    elif args.layers:
        checks.run(lambda: _refuse("--layers: says which blocks --sweep edits with; tracing goes through all of them."))
    if not args.no_figure:
        checks.run(figures.check)
    checks.run(lambda: check_writable(args.out, "--out"))
    checks.run(lambda: check_writable(args.cache_dir or default_cache_dir(), "--cache-dir"))
    checks.finish()
    return facts, hp, blocks


def _check_numbers(args: argparse.Namespace, blocks: int) -> None:
    least = {"--count": args.count, "--samples": args.samples, "--batch-tokens": args.batch_tokens}
    problems = [f"{flag} {value}: at least 1." for flag, value in least.items() if value < 1]
    if not args.noise > 0 or args.noise == float("inf"):
        problems.append(f"--noise {args.noise:g}: a number above 0, such as 3; nothing is corrupted without noise.")
    if args.window is not None and not 1 <= args.window <= (blocks or args.window):
        problems.append(f"--window {args.window}: from 1 to the number of blocks, {blocks}.")
    if args.severed and not {"mlp", "attention"} & set(args.kinds):
        problems.append("--severed: give --kinds with mlp or attention, which are what is cut off.")
    if args.fast and args.severed:
        problems.append("--fast --severed: a severed path is measured by restoring; give one of them.")
    if problems:
        raise InputError(problems)


def _refuse(message: str) -> None:
    raise InputError(message)


def _editor(hp: MethodHParams) -> EditorHParams:
    from editunlearn.hparams import EditorHParams

    if not isinstance(hp, EditorHParams):
        raise InputError(f"--sweep: {hp.method} changes no weights. Take a closed-form editor, such as memit.")
    return hp


def _dry_run(console: Console, args: argparse.Namespace, facts: Sequence[Fact], blocks: int) -> None:
    from editunlearn.estimate import tokens_of

    used = facts[: args.count]
    tokens = [tokens_of([fact.prompt]) for fact in used]
    states = 0 if args.fast else sum(len(args.kinds) * blocks * count for count in tokens)
    passed = sum(args.samples * count * (2 if args.fast else len(args.kinds) * blocks * count) for count in tokens)
    console.table("estimate", ["what", "about"], [("states restored", states), ("tokens through the model", passed)])
    console.result_json({"states": states, "tokens": passed, "facts": len(used), "blocks": blocks})
    console.info("Nothing was loaded or written.")


def _run(args: argparse.Namespace, facts: list[Fact], hp: MethodHParams | None, window: int, console: Console) -> None:
    from editunlearn.artifacts import atomic_write_json
    from editunlearn.editors import located
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.run_folder import WORK
    from editunlearn.tracing import averages, figures, prompts
    from editunlearn.tracing.effects import Settings, trace_all

    cache = args.cache_dir or default_cache_dir()
    lm = load_model(args)
    known, asked = prompts.known(lm, facts, args.count)
    if len(known) < args.count:
        console.warn(f"the model answers only {len(known)} of {asked} facts; only those are traced.")
    spread = prompts.embedding_spread(lm)
    settings = Settings(
        args.noise * spread,
        args.samples,
        window,
        tuple(kind for kind in KINDS if kind in args.kinds),
        not args.fast,
        args.severed,
        args.seed or 0,
    )
    console.info(f"{len(known)} facts that the model answers, of {asked} asked; embeddings spread by {spread:.4g}")
    effects = trace_all(
        lm,
        [prompts.traced(lm, fact) for fact in known],
        settings,
        tokens=args.batch_tokens,
        root=args.out / WORK,
        fresh=args.fresh,
        console=console,
    )
    found = {**_about(lm, args, settings, effects, asked), **averages.summary(effects, settings)}
    if settings.measured and "mlp" in settings.kinds:
        effects_of_mlps = [cell[0] for cell in found["kinds"]["mlp"]["measured"][prompts.LAST]]
        located.keep(lm, cache, effects_of_mlps, len(known))
    if hp is not None:
        from editunlearn import layer_sweep

        found["sweep"] = layer_sweep.run(
            lm, known, hp, args.layers, cache=cache, root=args.out / WORK, fresh=args.fresh, console=console
        )
        found["sweep"]["agreement_with_tracing"] = layer_sweep.agreement(found["sweep"]["layers"], found)
    if not args.no_figure:
        figures.write(args.out, found)
    atomic_write_json(args.out / FILE, found)
    _show(console, found, args.out, args.model)


def _about(
    lm: LM, args: argparse.Namespace, settings: Settings, effects: Sequence[Effects], asked: int
) -> dict[str, Any]:
    from editunlearn import __version__
    from editunlearn.lm.fingerprint import model_fingerprint
    from editunlearn.pipeline import environment

    return {
        "format": 1,
        "editunlearn": __version__,
        "command": args.command,
        "model": {
            "name": Path(lm.name).name if Path(lm.name).is_absolute() else lm.name,
            "revision": lm.revision,
            "fingerprint": model_fingerprint(lm),
            "dtype": str(lm.dtype).removeprefix("torch."),
            "blocks": lm.layout.num_layers(lm.model),
        },
        "environment": dict(environment()),
        "settings": {**asdict(settings), "noise_in_standard_deviations": args.noise},
        "asked": asked,
        "facts": [{"id": one.prompt.id, "clean": one.clean, "corrupted": one.corrupted} for one in effects],
    }


def _show(console: Console, found: dict[str, Any], out: Path, model: str) -> None:
    from editunlearn.tracing.prompts import LAST

    part = "measured" if all("measured" in about for about in found["kinds"].values()) else "estimated"
    chances = found["probability"]
    rows = [(name.replace("_", " "), _cell(chances[name])) for name in ("clean", "corrupted", "total_effect")]
    console.table("probability of the answer", ["", "mean [95% interval]"], rows)
    columns = {kind: about[part][LAST] for kind, about in found["kinds"].items()}
    columns |= {f"{path} cut": cells for path, cells in found["severed_at_last_subject_token"].items()}
    blocks = range(found["model"]["blocks"])
    console.table(
        f"effect at the last subject token, {part}",
        ["block", *columns],
        [[layer, *(_cell(cells[layer]) for cells in columns.values())] for layer in blocks],
    )
    if part == "measured":
        peaks = [
            (kind, about["peak"]["role"], about["peak"]["layer"], _cell(about["peak"]["effect"]), *_agree(about))
            for kind, about in found["kinds"].items()
        ]
        titles = ["kind", "largest at", "block", "effect", "estimate agrees, per fact", "in averages"]
        console.table("largest average effects; rank correlation with the gradient's estimate", titles, peaks)
    if "sweep" in found:
        from editunlearn import layer_sweep

        layer_sweep.show(console, found["sweep"])
    console.result_json(found)
    console.info(f"written: {out / FILE}")
    command = ["editunlearn", "apply", "--hparams", "memit", "--model", model, "--set", "layers=located"]
    console.next_step(command)


def _agree(about: dict[str, Any]) -> tuple[str, str]:
    of_averages = about["agreement"]["of_averages"]
    return _cell(about["agreement"]["per_fact"]), "-" if of_averages is None else f"{of_averages:.2f}"


def _cell(value: Sequence[Any] | None) -> str:
    if value is None:
        return "-"
    mean, low, high, _ = value
    return f"{mean:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    sys.exit(main())
