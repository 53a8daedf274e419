"""Measure second moments ahead of time: ``python -m editunlearn.stats --model M --hparams memit``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    run_command,
)
from editunlearn.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from editunlearn.console import Console
    from editunlearn.editors.moments import SiteMoment
    from editunlearn.estimate import Target
    from editunlearn.hparams import EditorHParams, MethodHParams
    from editunlearn.lm.loading import LM

PROBES = 50
"""Shipped facts whose solve shows how steady a second moment is."""

EXAMPLES = """\
  editunlearn stats --hparams memit                              for the layers that memit edits in the demo model
  editunlearn stats --hparams memit --model Qwen/Qwen3-0.6B --layers 3 4 5 --set moments.tokens=200000
  torchrun --nproc-per-node 4 -m editunlearn.stats --hparams memit   the text is shared by four processes
  editunlearn stats --hparams alphaedit --set moments.text=wiki.txt --cache-dir /data/stats"""


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("stats", __doc__ or "", EXAMPLES)
    add_hparams_flags(p)
    add_model_flags(p)
    add_offload_flag(p)
    p.add_argument("--layers", type=int, nargs="+", help="block numbers (default: those that the hparams edit)")
    p.add_argument("--stability", action="store_true", help="how much half of the text would change the solve")
    state = p.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on with interrupted work (the default)")
    state.add_argument("--fresh", action="store_true", help="measure anew even what is in the cache")
    add_run_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _with_moments(hp: MethodHParams) -> EditorHParams:
    from editunlearn.hparams import EditorHParams

    if not isinstance(hp, EditorHParams):
        raise InputError(f"--hparams: {hp.method} needs no second moments; there is nothing to measure.")
    return hp


def _main(args: argparse.Namespace, console: Console) -> None:
    from editunlearn import estimate
    from editunlearn.lm.loading import default_cache_dir

    checks = Checks()
    cache = args.cache_dir or default_cache_dir()
    config = checks.run(lambda: check_model(args))
    hp = checks.run(lambda: _with_moments(load_settings(args, config, console)))
    checks.run(lambda: check_writable(cache, "--cache-dir"))
    if hp is not None:
        checks.run(lambda: check_settings(hp, config, args.layers))
        if hp.moments.text == "none":
            checks.run(lambda: _nothing_to_measure(args.hparams))
    checks.finish()
    assert hp is not None  # noqa: S101 - finish() raised otherwise
    target = estimate.target(config, hp, args.layers)
    layers = target.layers
    console.header(
        [
            f"second moments of {args.model}: layers {', '.join(map(str, layers))} ({target.why})",
            f"text: {hp.moments.budget(target.width):,} tokens of {hp.moments.text}; cache: {cache}",
        ]
    )
    if args.dry_run:
        _dry_run(console, args, hp, target)
        return
    from editunlearn import editors
    from editunlearn.editors import located, moments
    from editunlearn.lm.processes import Processes, joined

    with joined() as here:
        lm = load_model(args)
        lm.among = here
        if args.layers is None:
            found_layers, why = located.settled(lm, hp, cache, editors.module(hp.method).DEFAULT_LAYERS)
            layers = [int(layer) for layer in found_layers.layers] if why else layers
        sites = lm.layout.sites(layers)
        measured = moments.get(lm, sites, hp.moments, cache, console, fresh=args.fresh)
        lm.among = Processes()  # the rest is for the one that speaks
    if not here.first:
        return
    change = _stability(lm, measured, hp, cache, console) if args.stability else {}
    found = {name: one.moment.diagonal().double() for name, one in measured.items()}
    rows = []
    for name, values in found.items():
        last = [f"{change[name]:.3f}"] if change else []
        rows.append((name, len(values), f"{values.mean():.4g}", f"{values.max() / values.mean():.1f}", *last))
    columns = ["module", "width", "mean square", "largest / mean", *(["change by half the text"] if change else [])]
    console.table("second moments", columns, rows)
    console.result_json(
        {
            name: {
                "width": len(values),
                "mean_square": float(values.mean()),
                **({"change_by_half": change[name]} if change else {}),
            }
            for name, values in found.items()
        }
    )
    settings = [part for item in args.set for part in ("--set", item)]
    console.next_step(["editunlearn", "apply", "--hparams", args.hparams, *settings, "--model", args.model])


def _stability(
    lm: LM, found: dict[str, SiteMoment], hp: EditorHParams, cache: Path, console: Console
) -> dict[str, float]:
    """By site, how far the solve of some shipped facts would be off with half of the text."""
    from editunlearn.editors import contexts, keys, moments
    from editunlearn.facts.readers import load_facts
    from editunlearn.resources import shipped_path

    sites = [lm.layout.site(lm.layout.layer_of(name)) for name in found]
    tokens = sum(map(len, moments.pieces(lm, sites, hp.moments)))
    less = hp.moments.model_copy(update={"tokens": max(1, tokens // 2)})
    half = moments.get(lm, sites, less, cache, console)
    facts = load_facts(shipped_path("data", "general_facts.jsonl"))
    rows = contexts.keep_rows(lm, facts[:: max(1, len(facts) // PROBES)], hp, answers=False)
    probes = keys.collect(lm, rows, sites)
    return {
        name: moments.change_of_solve(half[name].moment, one.moment, probes[name], hp.moments.weight)
        for name, one in found.items()
    }


def _dry_run(console: Console, args: argparse.Namespace, hp: EditorHParams, target: Target) -> None:
    from editunlearn import estimate
    from editunlearn.footprint import footprint, rounded_to

    dtype = estimate.dtype_of(target.config, args.dtype)
    rounded = rounded_to(target.config, args.dtype)
    memory = footprint(target, hp, dtype, [], rounded, offload=args.offload).rows(dtype)
    once = estimate.statistics(estimate.cost(target.model), hp, target.depth, target.width)
    # without --offload one pass, up to the last layer, is for all of them
    passes = sum((n + 1) / (target.layers[-1] + 1) for n in target.layers) if args.offload else 1.0
    flops = {"second moments": passes * once}
    disk = float(sum(4 * width * width for _, width in target.shapes))
    console.table("estimate", ["what", "amount"], estimate.shown(flops, memory, disk, "second moments"))
    console.result_json(
        {
            "layers": target.layers,
            "text": hp.moments.text,
            "tokens": hp.moments.budget(target.width),
            "memory_bytes": memory,
            "flop": flops,
            "disk_bytes": disk,
        }
    )
    console.info("Nothing was loaded or written.")


def _nothing_to_measure(hparams: str) -> None:
    raise InputError(
        f"{hparams}: moments.text is 'none', so there is nothing to measure. Give --set moments.text=general."
    )


if __name__ == "__main__":
    sys.exit(main())
