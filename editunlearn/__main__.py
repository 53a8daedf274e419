"""``editunlearn COMMAND`` is ``python -m editunlearn.COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from editunlearn import __version__
from editunlearn.console import Console
from editunlearn.naming import did_you_mean

COMMANDS = {
    "apply": "edit a model so that it forgets facts, and measure it",
    "stats": "measure second moments of a model ahead of time",
    "locate": "find the states that carry facts, by causal tracing; measure edits layer by layer",
    "evaluate": "measure models and deltas with benchmarks, also under quantisation",
    "compare": "run several methods on equal terms, and show what each forgets, keeps and costs",
    "finetune": "teach a model facts, to measure forgetting against one that never knew them",
    "report": "put evaluations side by side on one page",
    "validate": "check hparams, facts, deltas, models and results before a long run",
    "ls": "list methods, hparams, suites, attacks, architectures, saved edits",
    "completion": "print a completion script for bash, zsh or fish",
    "export": "turn a saved delta into a LoRA adapter, a merged model, or a delta without some facts",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    if args[:1] == ["--version"]:
        console.result(f"editunlearn {__version__}")
        return 0
    if not args or args[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
        console.result(
            f"usage: editunlearn COMMAND ...\n\n{rows}\n\nEach has --help. Start: editunlearn apply --hparams memit"
        )
        return 0
    if args[0] not in COMMANDS:
        console.error(f"unknown command {args[0]!r}.{did_you_mean(args[0], COMMANDS)} Commands: {', '.join(COMMANDS)}.")
        return 2
    return int(import_module(f"editunlearn.{args[0]}").main(args[1:]))


if __name__ == "__main__":
    sys.exit(main())
