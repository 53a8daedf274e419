"""What the commands share: flags, the order of checks, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from editunlearn.errors import EditUnlearnError, InputError

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.lm.loading import LM

T = TypeVar("T")
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse whose errors look like all the others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}. See {self.prog} --help.")


def parser(command: str, description: str, examples: str) -> Parser:
    """A parser with the program name ``editunlearn COMMAND`` and examples at the end of its help."""
    return Parser(
        prog=f"editunlearn {command}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """--model and how to load it."""
    group = p.add_argument_group("model")
    group.add_argument("--model", default="demo", help="hub id, folder, .gguf file, or demo (default)")
    group.add_argument("--revision", help="hub branch, tag or commit")
    group.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    group.add_argument(
        "--device-map", help="a device such as cuda:1, or auto (needs accelerate); default: the GPU if any"
    )


def add_hparams_flags(p: argparse.ArgumentParser) -> None:
    """--hparams and what changes them."""
    group = p.add_argument_group("method")
    group.add_argument(
        "--hparams", required=True, metavar="FILE|NAME", help="a file, or a shipped name: memit, paper/rome, ..."
    )
    group.add_argument("--hparams-format", choices=("editunlearn", "easyedit"), default="editunlearn")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting, e.g. refine.steps=80"
    )
    group.add_argument("--seed", type=int, help="seed of all random choices (default: the hparams' own)")


def add_run_flags(p: argparse.ArgumentParser) -> None:
    """Cache, terminal and the like."""
    group = p.add_argument_group("run")
    group.add_argument(
        "--cache-dir",
        type=Path,
        help="statistics and converted models (default: $EDITUNLEARN_CACHE or ~/.cache/editunlearn)",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="check everything, show what would be done and what it needs, stop"
    )
    group.add_argument("--json", action="store_true", help="results as JSON on standard output")
    group.add_argument("--quiet", action="store_true", help="only results, warnings and errors")
    group.add_argument("-v", "--verbose", action="count", default=0, help="details; -vv every step")


def console_of(args: argparse.Namespace) -> Console:
    """The console that the flags ask for."""
    from editunlearn.console import Console

    return Console(quiet=args.quiet, verbose=args.verbose, json=args.json)


class Checks:
    """Runs several checks and reports what all of them found at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def run(self, check: Callable[[], T]) -> T | None:
        """The result of ``check``, or None when it found bad input."""
        try:
            return check()
        except InputError as error:
            self.problems += [p for p in error.problems if p not in self.problems]
            return None

    def finish(self) -> None:
        """Raise InputError with everything that was found, if anything was."""
        if self.problems:
            raise InputError(self.problems)


def load_model(args: argparse.Namespace) -> LM:
    """The model that the flags name, its own progress bars off."""
    from transformers.utils import logging

    from editunlearn.lm.loading import load

    logging.disable_progress_bar()
    return load(
        args.model, dtype=args.dtype, device_map=args.device_map, revision=args.revision, cache_dir=args.cache_dir
    )


def run_command(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> int:
    """Call a command and turn what happens into an exit code: 0 done, 1 failed, 2 bad input, 3 gate, 130 interrupted."""
    from editunlearn.console import Console
    from editunlearn.lm.batching import out_of_memory

    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except EditUnlearnError as error:
        Console(quiet=True).error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        Console(quiet=True).error("interrupted; finished work is kept. Run the same command again to go on.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, OSError) or out_of_memory(error):
            Console(quiet=True).error(_system_problem(error))
            return 1
        raise
    return 0


def _system_problem(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}. Finished work is kept; run the same command again to go on."
    return f"out of memory: {error}. Try --dtype bfloat16, --set batch_tokens=512, --set refine.batch_tokens=512."
