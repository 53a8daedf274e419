"""Check files before a long run: ``python -m editunlearn.validate memit.yaml forget.jsonl runs/memit --model M``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import (
    Checks,
    add_model_flags,
    add_run_flags,
    check_model,
    check_settings,
    parser,
    run_command,
)
from editunlearn.errors import InputError
from editunlearn.naming import did_you_mean

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.facts.records import Fact

EXAMPLES = """\
  editunlearn validate memit.yaml forget.jsonl                   what each file is, is seen from the file
  editunlearn validate memit forget.jsonl --retain keep.jsonl --model Qwen/Qwen3-0.6B
  editunlearn validate runs/memit --model ./base                 also that the delta was made for these very weights"""
SHOWN = 60
"""Characters of a name in the table."""


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("validate", __doc__ or "", EXAMPLES)
    p.add_argument("paths", nargs="*", metavar="FILE", help="hparams, facts, results, a delta's or a model's folder")
    p.add_argument("--retain", action="append", default=[], metavar="FILE", help="facts that must stay")
    p.add_argument("--hparams-format", choices=("editunlearn", "easyedit"), default="editunlearn")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for apply, for all hparams")
    p.add_argument("--data-root", type=Path, help="folder with local copies of hub datasets")
    add_model_flags(p, None, "none: nothing is checked against a model")
    add_run_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    if not args.paths and not args.retain and args.model is None:
        raise InputError("validate: nothing to check. Name files, or --model.")
    checks = Checks()
    config = checks.run(lambda: check_model(args)) if args.model is not None else None
    found: list[tuple[str, str, str]] = []
    facts: list[Fact] = []
    for path in args.paths:
        kind = checks.run(lambda path=path: kind_of(path))  # type: ignore[misc]
        if kind is None:
            continue
        said = checks.run(lambda path=path, kind=kind: _KINDS[kind](path, args, config, facts))  # type: ignore[misc]
        if said is not None:
            found.append((kind, path, said))
    for path in args.retain:
        retain = checks.run(lambda path=path: _load_facts(path, args, "first"))  # type: ignore[misc]
        if retain is not None:
            found.append(("facts", path, f"{len(retain)} facts to keep"))
            checks.run(lambda path=path, retain=retain: _apart(facts, retain, path))  # type: ignore[misc]
    if args.model is not None and config is not None:
        checks.run(lambda: _checkpoint(args.model))
        found.append(("model", args.model, f"{config.model_type}, can be edited"))
    checks.finish()
    console.table("all is well", ["what", "where", "found"], [(k, p[-SHOWN:], said) for k, p, said in found])
    console.result_json([{"what": kind, "where": path, "found": said} for kind, path, said in found])


def kind_of(path: str) -> str:
    """``hparams``, ``facts``, ``results``, ``delta`` or ``model``, told by name and content.

    Raises:
        InputError: there is no such file, or it is none of these.
    """
    from editunlearn.resources import shipped_names

    place = Path(path).expanduser()
    if place.is_dir():
        return _kind_of_folder(place)
    if place.is_file():
        if place.suffix in (".yaml", ".yml"):
            return "hparams"
        return "results" if place.suffix == ".json" and _is_results(place) else "facts"
    shipped = [name.removesuffix(".yaml") for name in shipped_names("hparams")]
    if path.removesuffix(".yaml") in shipped:
        return "hparams"
    if ":" in path or path.count("/") == 1 and not place.parent.is_dir():
        return "facts"  # a hub id, which the reader looks up
    there = sorted(other.name for other in place.parent.iterdir()) if place.parent.is_dir() else []
    near = did_you_mean(place.name, [*there, *shipped])
    raise InputError(f"{path}: no such file or folder.{near}")


def _kind_of_folder(place: Path) -> str:
    for name, kind in {"delta.json": "delta", "config.json": "model"}.items():
        if (place / name).is_file():
            return kind
    there = ", ".join(sorted(other.name for other in place.iterdir())[:5]) or "nothing"
    raise InputError(
        f"{place}: neither a delta (delta.json) nor a model (config.json); there is {there}. A run that was killed has "
        "no delta.json yet: run its command again."
    )


def _is_results(place: Path) -> bool:
    try:
        value = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        return False  # the reader of facts says where it is damaged
    return isinstance(value, dict) and "summary" in value


def _hparams(path: str, args: argparse.Namespace, config: Any, _facts: list[Fact]) -> str:
    from editunlearn.hparams import load_hparams

    kind = getattr(config, "model_type", None)
    hp = load_hparams(path, set=args.set, model_type=kind, format=args.hparams_format)
    check_settings(hp, config)
    return f"{hp.method}, layers {hp.layers}"


def _load_facts(path: str, args: argparse.Namespace, conflicts: Any) -> list[Fact]:
    from editunlearn.facts.readers import load_facts

    return load_facts(path, data_root=args.data_root, conflicts=conflicts)


def _read_facts(path: str, args: argparse.Namespace, _config: Any, facts: list[Fact]) -> str:
    read = _load_facts(path, args, "error")
    facts.extend(read)
    guessed = sum(fact.subject_found for fact in read)
    return f"{len(read)} facts" + (f", the subjects of {guessed} guessed" if guessed else "")


def _apart(facts: Sequence[Fact], retain: Sequence[Fact], path: str) -> None:
    """Nothing is both to be forgotten and to be kept."""
    from editunlearn.facts.readers import comparable

    asked = {comparable(fact.prompt): fact for fact in facts}
    both = [(fact, asked[comparable(fact.prompt)]) for fact in retain if comparable(fact.prompt) in asked]
    problems = [f'"{kept.id}" is to be kept, "{gone.id}" to be forgotten: "{kept.prompt}"' for kept, gone in both]
    if problems:
        raise InputError([f"{path}: {problem}" for problem in problems])


def _results(path: str, _args: argparse.Namespace, _config: Any, _facts: list[Fact]) -> str:
    from editunlearn.evaluation.report.gathering import gather

    found = gather([Path(path)])
    return f"results of {', '.join(found)}"


def _delta(path: str, args: argparse.Namespace, config: Any, _facts: list[Fact]) -> str:
    from editunlearn.deltas.build import check_finite
    from editunlearn.deltas.files import load
    from editunlearn.errors import NumericalError

    delta = load(path)
    try:
        check_finite(delta.tensors())
    except NumericalError as error:
        raise InputError(f"{path}: {error}") from error
    if config is not None:
        _fits(path, delta, args, config)
    manifest = delta.manifest
    return f"{manifest.method}, {manifest.fact_count} facts, for {manifest.base.name}"


def _fits(path: str, delta: Delta, args: argparse.Namespace, config: Any) -> None:
    """The delta is for modules of this model; where its weights are files here, for these very weights."""
    from editunlearn.deltas.files import stale_weight
    from editunlearn.deltas.shards import find_key, read_checkpoint, read_tensor
    from editunlearn.lm.sources import meta_model
    from editunlearn.lm.weights import find, read_weight

    model = meta_model(config)
    for name, site in delta.manifest.sites.items():
        there = tuple(read_weight(model, name).shape) if find(model, name) is not None else None
        if there != site.shape:
            has = f"one of {there}" if there else "no such module"
            raise InputError(f"{path}: changes {name}, of shape {site.shape}; {args.model} has {has}.")
    folder = Path(args.model)
    if not folder.is_dir() or not list(folder.glob("*.safetensors")):
        return
    tensors = read_checkpoint(folder)
    for name, site in delta.manifest.sites.items():
        key = find_key(name, tensors)
        if key is None:
            continue
        weight = read_tensor(folder, tensors[key])
        problem = stale_weight(name, site, weight.T if site.transposed else weight, delta.manifest)
        if problem:
            raise InputError(f"{path}: {problem}")


def _model(path: str, args: argparse.Namespace, _config: Any, _facts: list[Fact]) -> str:
    own = argparse.Namespace(**{**vars(args), "model": path, "revision": None})
    config = check_model(own)
    _checkpoint(path)
    return f"{config.model_type}, can be edited"


def _checkpoint(path: str) -> None:
    """The shards of a local checkpoint are there and readable; of other models nothing is known here."""
    from editunlearn.deltas.shards import read_checkpoint

    folder = Path(path)
    if folder.is_dir() and list(folder.glob("*.safetensors*")):
        read_checkpoint(folder)


_KINDS: dict[str, Callable[[str, argparse.Namespace, Any, list[Fact]], str]] = {
    "hparams": _hparams,
    "facts": _read_facts,
    "results": _results,
    "delta": _delta,
    "model": _model,
}


if __name__ == "__main__":
    sys.exit(main())
