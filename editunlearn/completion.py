"""Completion for a shell: ``eval "$(editunlearn completion bash)"``, or zsh; ``... fish | source``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from editunlearn.cli import parser, run_command
from editunlearn.resources import shipped_names

if TYPE_CHECKING:
    from editunlearn.console import Console

EXAMPLES = """\
  eval "$(editunlearn completion bash)"      in ~/.bashrc; zsh likewise
  editunlearn completion fish | source       in ~/.config/fish/config.fish"""
SHELLS = ("bash", "zsh", "fish")


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("completion", __doc__ or "", EXAMPLES)
    p.add_argument("shell", choices=SHELLS)
    p.set_defaults(quiet=False, verbose=0, json=False)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    console.result(script(args.shell))


def words() -> dict[str, dict[str, list[str]]]:
    """For each command its flags and positional choices, and what may stand behind each flag (none: a file)."""
    from editunlearn.__main__ import COMMANDS

    named = [name.removesuffix(".yaml") for name in shipped_names("hparams") if name.endswith(".yaml")]
    found: dict[str, dict[str, list[str]]] = {}
    for command in COMMANDS:
        of_command: dict[str, list[str]] = {}
        for action in import_module(f"editunlearn.{command}").flags()._actions:
            choices = [str(choice) for choice in action.choices or ()]
            if "--hparams" in action.option_strings:
                choices = named
            for flag in action.option_strings or ([""] if choices else []):
                of_command[flag] = choices
        found[command] = of_command
    return found


def script(shell: str) -> str:
    """The completion script for one of ``SHELLS``."""
    return _fish() if shell == "fish" else _bash(zsh=shell == "zsh")


def _bash(*, zsh: bool) -> str:
    every = words()
    lines = ["autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    lines += ["_editunlearn() {", '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"']
    lines += [f"  local known={shlex.quote(' '.join(every))}", "  COMPREPLY=()"]
    lines += ['  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "$known" -- "$cur")); return; fi']
    lines += ['  case "${COMP_WORDS[1]} $prev" in']
    for command, of_command in every.items():
        for flag, choices in of_command.items():
            if flag and choices:
                wanted = shlex.quote(" ".join(choices))
                lines.append(f'    "{command} {flag}") COMPREPLY=($(compgen -W {wanted} -- "$cur")); return;;')
    lines += ["  esac", '  case "${COMP_WORDS[1]}" in']
    for command, of_command in every.items():
        wanted = shlex.quote(" ".join([*filter(None, of_command), *of_command.get("", [])]))
        lines.append(f'    {command}) COMPREPLY=($(compgen -W {wanted} -- "$cur"));;')
    return "\n".join([*lines, "  esac", "}", "complete -o default -F _editunlearn editunlearn"])


def _fish() -> str:
    from editunlearn.__main__ import COMMANDS

    lines = ["complete -c editunlearn -f -n __fish_use_subcommand -a " + shlex.quote(" ".join(COMMANDS))]
    for command, of_command in words().items():
        seen = f"complete -c editunlearn -n '__fish_seen_subcommand_from {command}'"
        for flag, choices in of_command.items():
            name = f" -l {flag.removeprefix('--')}" if flag.startswith("--") else f" -s {flag[1:]}" if flag else ""
            given = f" -xa {shlex.quote(' '.join(choices))}" if choices else ""
            lines.append(seen + name + given)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
