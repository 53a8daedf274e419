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
    console_of,
    load_model,
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
    from editunlearn import editors
    from editunlearn.facts.text import check_source
    from editunlearn.hparams import load_hparams
    from editunlearn.lm.layout import check_config, resolve_layers, text_config
    from editunlearn.lm.loading import default_cache_dir, peek_config
    from editunlearn.pipeline import check_writable

    args = arguments(argv)
    console = console_of(args)
    checks = Checks()
    cache = args.cache_dir or default_cache_dir()
    config = checks.run(lambda: peek_config(args.model, args.revision))
    if config is not None:
        checks.run(lambda: check_config(config))
    kind = getattr(config, "model_type", None)
    hp = checks.run(lambda: load_hparams(args.hparams, set=args.set, model_type=kind, format=args.hparams_format))
    checks.run(lambda: check_writable(cache))
    if hp is not None:
        checks.run(lambda: check_source(hp.moments.text))
        if hp.moments.text == "none":
            checks.run(lambda: _nothing_to_measure(args.hparams))
        blocks = getattr(text_config(config), "num_hidden_layers", None) if config is not None else None
        if blocks:
            checks.run(
                lambda: resolve_layers(args.layers or hp.layers, blocks, editors.module(hp.method).DEFAULT_LAYERS)
            )
    checks.finish()
    assert hp is not None  # noqa: S101 - finish() raised otherwise
    if args.dry_run:
        console.result(
            f"would measure {hp.moments.tokens:,} tokens of {hp.moments.text!r}. Nothing was loaded or written."
        )
        return
    from editunlearn.editors import moments

    lm = load_model(args)
    spec = args.layers or hp.layers
    layers, why = resolve_layers(spec, lm.layout.num_layers(lm.model), editors.module(hp.method).DEFAULT_LAYERS)
    console.header(
        [
            f"second moments of {lm.name}: layers {', '.join(map(str, layers))} ({why}), {hp.moments.tokens:,} tokens of {hp.moments.text}"
        ]
    )
    found = moments.get(lm, lm.layout.sites(layers), hp.moments, cache, console, fresh=args.fresh)
    rows = []
    for name, moment in found.items():
        values = moment.double().diagonal()
        rows.append((name, len(moment), f"{values.mean():.4g}", f"{values.max() / values.mean():.1f}"))
    console.table("second moments", ["module", "width", "mean square", "largest / mean"], rows)
    console.result_json(
        {name: {"width": len(m), "mean_square": float(m.diagonal().mean())} for name, m in found.items()}
    )
    console.next_step(["editunlearn", "apply", "--hparams", args.hparams, "--model", args.model])


def _nothing_to_measure(hparams: str) -> None:
    raise InputError(
        f"{hparams}: moments.text is 'none', so there is nothing to measure. Give --set moments.text=general."
    )


if __name__ == "__main__":
    sys.exit(main())
