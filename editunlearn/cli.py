"""What the commands share: flags, the order of checks, exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from editunlearn.errors import EditUnlearnError, InputError

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.manifest import BaseManifest
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import EditorHParams, Keeping, MethodHParams, UnlearnerHParams
    from editunlearn.lm.chat import Chat
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


def add_model_flags(p: argparse.ArgumentParser, default: str | None = "demo", default_help: str = "demo") -> None:
    """--model and how to load it."""
    group = p.add_argument_group("model")
    group.add_argument(
        "--model", default=default, help=f"hub id, folder, .gguf file, or demo (default: {default_help})"
    )
    group.add_argument("--revision", help="hub branch, tag or commit")
    group.add_argument(
        "--dtype",
        default="auto",
        help="auto (default), float32, bfloat16 or float16; nf4 or int8: round the blocks (needs bitsandbytes)",
    )
    group.add_argument(
        "--device-map", help="a device such as cuda:1, or auto (needs accelerate); default: the GPU if any"
    )
    group.add_argument("--system", metavar="TEXT", help="system prompt for the chat template, wherever it is used")
    group.add_argument(
        "--chat-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the chat template, e.g. enable_thinking=false",
    )
    group.add_argument("--no-chat", action="store_true", help="leave the chat template out; ask like a base model")


def add_offload_flag(p: argparse.ArgumentParser) -> None:
    """--offload, for commands that edit or measure second moments."""
    p.add_argument(
        "--offload",
        action="store_true",
        help="least memory beside the model: second moments of one layer at a time, a pass over the text for each, and "
        "small batches; slower, the same result",
    )


def add_hparams_flags(p: argparse.ArgumentParser, default: str | None = None) -> None:
    """--hparams and what changes them; required when there is no default."""
    group = p.add_argument_group("method")
    group.add_argument(
        "--hparams",
        required=default is None,
        default=default,
        metavar="FILE|NAME",
        help="a file, or a shipped name: memit, paper/rome, ..." + (f" (default: {default})" if default else ""),
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
    from editunlearn.lm.processes import launched

    return Console(quiet=args.quiet, verbose=args.verbose, json=args.json, silent=not launched().first)


def load_settings(args: argparse.Namespace, config: Any, console: Console) -> MethodHParams:
    """The hparams that the flags name, for a model of this configuration (None: not known).

    Raises:
        InputError: everything that is wrong with them, the layers that this model does not have included.
    """
    from editunlearn.hparams import easyedit, load_hparams

    given = {"seed": args.seed, "merge.by": getattr(args, "merge_queries", None)}
    extra = [f"{key}={value}" for key, value in given.items() if value is not None]
    kind = getattr(config, "model_type", None)
    hp = load_hparams(args.hparams, set=[*args.set, *extra], model_type=kind, format=args.hparams_format)
    if args.hparams_format == "easyedit":
        console.table("translated hparams", ["theirs", "value", "ours"], easyedit.read(args.hparams).rows)
    return hp


def check_settings(hp: MethodHParams, config: Any, layers: Sequence[int] | None = None) -> None:
    """Raise InputError unless a model of this configuration has the layers and the length, and the text is there."""
    from editunlearn import editors
    from editunlearn.facts.text import check_source
    from editunlearn.hparams import EditorHParams, UnlearnerHParams
    from editunlearn.lm.configs import text_config
    from editunlearn.lm.layers import resolve_layers

    checks = Checks()
    if isinstance(hp, EditorHParams):
        checks.run(lambda: check_source(hp.moments.text))
        checks.run(lambda: _check_lengths(hp, config))
    count = getattr(text_config(config), "num_hidden_layers", None) if config is not None else None
    if count and isinstance(hp, UnlearnerHParams):
        checks.run(lambda: resolve_layers(hp.layers, count, hp.auto_layers(count)))
    elif count:
        checks.run(lambda: resolve_layers(layers or hp.layers, count, editors.module(hp.method).DEFAULT_LAYERS))
    checks.finish()
    if config is not None and isinstance(hp, UnlearnerHParams):
        checks.run(lambda: _check_training(hp, config))
        checks.finish()


def _check_training(hp: UnlearnerHParams, config: Any) -> None:
    """The model has the matrices, and the retain term has a text."""
    from editunlearn.facts.text import check_source
    from editunlearn.lm.recognise import layout_of
    from editunlearn.lm.sources import meta_model
    from editunlearn.unlearners.parameters import trained_modules

    if hp.train.modules:
        model = meta_model(config)
        trained_modules(model, layout_of(model, config), hp)
    retain: Keeping | None = getattr(hp, "retain", None)
    if retain is not None and retain.data == "text":
        check_source(retain.text)


def _check_lengths(hp: EditorHParams, config: Any) -> None:
    from editunlearn.lm.configs import context_length

    most = context_length(config)
    lengths = {"moments.length": hp.moments.length, "refine.text_length": hp.refine.text_length if hp.refine else 0}
    wrong = [f"{key} is {length}; this model takes {most} tokens at most." for key, length in lengths.items()]
    if most and max(lengths.values()) > most:
        raise InputError([w for w, length in zip(wrong, lengths.values(), strict=True) if length > most])


def chat_of(args: argparse.Namespace, made: Sequence[BaseManifest] = ()) -> Chat:
    """How the flags say that the model is spoken to; without such flags, as the given deltas were made.

    Raises:
        InputError: an argument is not KEY=VALUE, or the deltas were made in different ways and no flag says which.
    """
    import yaml

    from editunlearn.lm.chat import Chat

    arguments: dict[str, Any] = {}
    for item in args.chat_arg:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--chat-arg {item}: write KEY=VALUE, such as enable_thinking=false.")
        arguments[key] = yaml.safe_load(value)
    given = Chat(args.system, arguments, not args.no_chat)
    if given != Chat() or not made:
        return given
    ways = [Chat.of(one.base.chat) for one in made]
    if any(way != ways[0] for way in ways):
        raise InputError(
            "--delta: these were made with different system prompts or arguments of the chat template; say with "
            "--system, --chat-arg or --no-chat how to ask, or measure them one by one."
        )
    return ways[0]


def check_model(args: argparse.Namespace, made: Sequence[BaseManifest] = ()) -> Any:
    """The configuration of the model that the flags name; its weights are not read.

    Raises:
        InputError: no such model, dtype or device, a chat template that does not do what is asked of it, or an
            architecture that cannot be edited.
    """
    from editunlearn.lm.configs import check_config
    from editunlearn.lm.loading import check_chat, check_options, peek_config

    checks = Checks()
    checks.run(lambda: check_options(args.dtype, args.device_map))
    config = checks.run(lambda: peek_config(args.model, args.revision))
    if config is not None:
        checks.run(lambda: check_config(config))
    args.chat = checks.run(lambda: chat_of(args, made))
    if config is not None and args.chat is not None:
        checks.run(lambda: check_chat(args.model, args.revision, args.chat))
    checks.finish()
    return config


def model_terms(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the model, to tell one request from another."""
    return {
        "model": args.model,
        "revision": args.revision,
        "dtype": args.dtype,
        "chat": [args.system, args.chat_arg, args.no_chat],
    }


def read_facts(
    args: argparse.Namespace, source: str, console: Console, *, limit: int | None = None, keep: bool = False
) -> list[Fact]:
    """The facts of a source; what the reader notes is shown.

    Args:
        keep: these must stay, of the same prompt with several answers the first counts.

    Raises:
        InputError: no such source, or facts that are bad.
    """
    from editunlearn.facts.readers import load_facts

    notes: list[str] = []
    found = load_facts(
        source,
        data_root=args.data_root,
        split=getattr(args, "split", "train"),
        limit=limit,
        notes=notes,
        conflicts="first" if keep else "error",
    )
    for note in notes:
        console.info(f"note: {note}")
    return found


def check_writable(folder: Path, flag: str) -> None:
    """Raise InputError unless files can be made in ``folder``, which need not exist yet."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{flag} {folder}: {place} is a file, not a folder.")
    try:  # permission bits do not tell: not to root, and not of every file system
        tempfile.TemporaryDirectory(dir=place, prefix=".editunlearn-").cleanup()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{flag} {folder}: {place} is not writable ({reason}). Choose another folder.") from None


def shown_command(words: Sequence[str]) -> str:
    """A command line for a model card: of absolute paths only the last part, they are nobody's business."""

    def public(text: str) -> str:
        head, equals, tail = text.rpartition("=")
        return f"{head}{equals}{Path(tail).name}" if tail.startswith(("/", "~")) or Path(tail).is_absolute() else text

    return shlex.join(map(public, words))


def try_command(folder: Path, *, code: bool = False) -> str:
    """A command line that lets a merged model say something; ``code``: one that brings code of its own."""
    more = ", trust_remote_code=True" if code else ""
    script = f"from transformers import pipeline; print(pipeline('text-generation', {str(folder)!r}{more})('...'))"
    plain = shlex.quote(str(folder)) == str(folder)
    return f'python -c "{script}"' if plain else shlex.join(["python", "-c", script])


class Checks:
    """Runs several checks and reports what all of them found at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def run(self, check: Callable[[], T]) -> T | None:
        """The result of ``check``, or None when it found bad input."""
        try:
            return check()
        except InputError as error:
            found = error.problems
        except OSError as error:  # a name that is too long, a folder that may not be read
            found = [f"{str(error.filename or '')[:200]}: {error.strerror or error}. Check the path."]
        self.problems += [p for p in found if p not in self.problems]
        return None

    def finish(self) -> None:
        """Raise InputError with everything that was found, if anything was."""
        if self.problems:
            raise InputError(self.problems)


def load_model(args: argparse.Namespace) -> LM:
    """The model that the flags name, its own progress bars off."""
    from transformers.utils import logging

    from editunlearn.lm.loading import load

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return load(
        args.model,
        dtype=args.dtype,
        device_map=args.device_map,
        revision=args.revision,
        cache_dir=args.cache_dir,
        chat=args.chat,
        offload=getattr(args, "offload", False),
    )


def run_command(
    flags: Callable[[], argparse.ArgumentParser],
    main: Callable[[argparse.Namespace, Console], Any],
    argv: Sequence[str] | None = None,
) -> int:
    """Call a command; exit codes: 0 done, 1 failed, 2 bad input, 3 a requirement not met, 130 interrupted.

    Args:
        flags: makes its parser; what was typed is parsed before anything heavy is imported.
        main: gets the flags, with the command line as ``command``, and the console that they ask for.
    """
    from editunlearn.console import Console

    words = list(sys.argv[1:] if argv is None else argv)
    again = "Run the same command again" + (" without --fresh" if "--fresh" in words else "") + " to go on."
    try:
        understood = flags()
        args = understood.parse_args(words)
        args.command = shown_command([*understood.prog.split(), *words])
        main(args, console_of(args))
    except EditUnlearnError as error:
        Console(quiet=True).error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        Console(quiet=True).error(f"interrupted; finished work is kept. {again}")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        problem = _system_problem(error)
        if problem is None:
            raise
        Console(quiet=True).error(f"{problem} Finished work is kept. {again}")
        return 1
    return 0


def _system_problem(error: Exception) -> str | None:
    """What the machine ran out of or refused, in one line; None for any other error."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}."
    if isinstance(error, SafetensorError) and "I/O error" in str(error):
        return f"{str(error).partition('I/O error: ')[2]}."
    from editunlearn.lm.batching import out_of_memory

    if out_of_memory(error):
        first = str(error).partition("\n")[0] or "the system has no more"
        return f"out of memory: {first} Try --dtype bfloat16, --set batch_tokens=512, --set refine.batch_tokens=512."
    return None
