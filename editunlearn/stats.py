"""Measure second moments ahead of time: ``python -m editunlearn.stats --model M --hparams memit``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from editunlearn.cli import (
    Checks,
    add_hparams_flags,
    add_model_flags,
    add_run_flags,
    check_model,
    check_settings,
    check_writable,
    console_of,
    load_model,
    load_settings,
    parser,
    run_command,
)
from editunlearn.errors import InputError

EXAMPLES = """\
  editunlearn stats --hparams memit                              for the layers that memit edits in the demo model
  editunlearn stats --hparams memit --model Qwen/Qwen3-0.6B --layers 3 4 5 --set moments.tokens=200000
  editunlearn stats --hparams alphaedit --set moments.text=wiki.txt --cache-dir /data/stats"""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags."""
    p = parser("stats", __doc__ or "", EXAMPLES)
    add_hparams_flags(p)
    add_model_flags(p)
    p.add_argument("--layers", type=int, nargs="+", help="block numbers (default: those that the hparams edit)")
    state = p.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on with interrupted work (the default)")
    state.add_argument("--fresh", action="store_true", help="measure anew even what is in the cache")
    add_run_flags(p)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    args = arguments(argv)  # before anything heavy is imported
    from editunlearn import editors
    from editunlearn.lm.layout import resolve_layers, text_config
    from editunlearn.lm.loading import default_cache_dir

    console = console_of(args)
    checks = Checks()
    cache = args.cache_dir or default_cache_dir()
    config = checks.run(lambda: check_model(args))
    hp = checks.run(lambda: load_settings(args, config, console))
    checks.run(lambda: check_writable(cache, "--cache-dir"))
    if hp is not None:
        checks.run(lambda: check_settings(hp, config, args.layers))
        if hp.moments.text == "none":
            checks.run(lambda: _nothing_to_measure(args.hparams))
    checks.finish()
    assert hp is not None  # noqa: S101 - finish() raised otherwise
    blocks = text_config(config).num_hidden_layers
    layers, why = resolve_layers(args.layers or hp.layers, blocks, editors.module(hp.method).DEFAULT_LAYERS)
    console.header(
        [
            f"second moments of {args.model}: layers {', '.join(map(str, layers))} ({why})",
            f"text: {hp.moments.tokens:,} tokens of {hp.moments.text}; cache: {cache}",
        ]
    )
    if args.dry_run:
        console.info("Nothing was loaded or written.")
        console.result_json({"layers": layers, "text": hp.moments.text, "tokens": hp.moments.tokens})
        return
    from editunlearn.editors import moments

    lm = load_model(args)
    found = moments.get(lm, lm.layout.sites(layers), hp.moments, cache, console, fresh=args.fresh)
    rows = []
    for name, moment in found.items():
        values = moment.double().diagonal()
        rows.append((name, len(moment), f"{values.mean():.4g}", f"{values.max() / values.mean():.1f}"))
    console.table("second moments", ["module", "width", "mean square", "largest / mean"], rows)
    console.result_json(
        {name: {"width": len(m), "mean_square": float(m.double().diagonal().mean())} for name, m in found.items()}
    )
    settings = [part for item in args.set for part in ("--set", item)]
    console.next_step(["editunlearn", "apply", "--hparams", args.hparams, *settings, "--model", args.model])


def _nothing_to_measure(hparams: str) -> None:
    raise InputError(
        f"{hparams}: moments.text is 'none', so there is nothing to measure. Give --set moments.text=general."
    )


if __name__ == "__main__":
    sys.exit(main())
