"""What a comparison is held against: a model that never knew, or what an evaluation of one has measured."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import Checks, check_model, load_model
from editunlearn.errors import InputError

if TYPE_CHECKING:
    from editunlearn.comparing.asking import Asking
    from editunlearn.evaluation.reference import Other
    from editunlearn.evaluation.results import Measured
    from editunlearn.evaluation.suites import Module

FLAG = "--reference"
FOLDER = "reference"
"""Where in ``--out`` its results are; also its name in tables."""
TAUGHT = "taught.json"
"""What ``finetune`` writes into the folder of a model."""


@dataclass(frozen=True)
class Reference:
    """What ``--reference`` names, checked.

    Attributes:
        model: flags that load it; None: only results are given.
        results: by suite, what an evaluation of it measured; empty where the model itself is asked.
    """

    model: argparse.Namespace | None
    results: Mapping[str, Other] = field(default_factory=dict)


@dataclass(frozen=True)
class Gold:
    """What is known of it.

    Attributes:
        sha: of its weights, or of its results.
        measured: items by what was asked, for numbers that compare.
        summary: of the test half with all that is measured beside; None where only results were given.
    """

    sha: str
    measured: Mapping[str, Measured]
    summary: Mapping[str, Any] | None


def named(args: argparse.Namespace, suites: Mapping[str, tuple[Module, Any]]) -> Reference:
    """The model or the results that ``--reference`` names; no weights are read.

    Args:
        suites: other benchmarks that are asked, by name, which results may be of.

    Raises:
        InputError: there is no such thing, the model was not taught like ``--model`` less what is to be forgotten, or
            the results are of something else than what is asked.
    """
    place = Path(args.reference)
    files = sorted(place.rglob("results.json")) if place.is_dir() and not (place / "config.json").is_file() else []
    if place.is_file() and place.suffix == ".json":
        files = [place]
    if files:
        return Reference(None, _results(args, files, suites))
    if place.is_dir() and not (place / "config.json").is_file():
        raise InputError(f"{FLAG} {place}: holds neither a model (config.json) nor results (results.json).")
    model = argparse.Namespace(**{**vars(args), "model": args.reference, "revision": None})
    try:
        check_model(model)
    except InputError as error:
        raise InputError([f"{FLAG}: {problem}" for problem in error.problems]) from None
    _check_taught(args)
    return Reference(model)


def _check_taught(args: argparse.Namespace) -> None:
    """As far as the folders tell, the reference was taught as the model was, less some facts."""
    from editunlearn.artifacts import cached_json

    if Path(args.reference).resolve() == Path(args.model).resolve():
        raise InputError(f"{FLAG} {args.reference}: is --model itself, which knows what is to be forgotten.")
    ours, gold = (cached_json(Path(place) / TAUGHT, dict) for place in (args.model, args.reference))
    if gold is None:
        return
    again = "Make it with finetune, the same flags as for --model and --without FACTS."
    if not gold["left_out"]:
        raise InputError(f"{FLAG} {args.reference}: was taught all facts, none were left out. {again}")
    if ours is None:
        return
    checked = {
        "base model": [one["base_fingerprint"] for one in (ours, gold)],
        "settings": [one["request"]["settings"] for one in (ours, gold)],
    }
    other = [name for name, (one, another) in checked.items() if one != another]
    if ours["facts"] != gold["facts"] + gold["left_out"]:
        other.append(f"facts: {gold['facts']} and {gold['left_out']} left out, where --model has {ours['facts']}")
    if other:
        raise InputError(f"{FLAG} {args.reference}: was taught otherwise than --model ({', '.join(other)}). {again}")


def _results(args: argparse.Namespace, files: list[Path], suites: Mapping[str, tuple[Module, Any]]) -> dict[str, Other]:
    """Results by the suite that they serve, asked what this comparison asks."""
    from editunlearn.evaluation.reference import load_others
    from editunlearn.evaluation.results import check_alike
    from editunlearn.evaluation.running import asked
    from editunlearn.lm.loading import without_weights

    checks, found = Checks(), {}
    for file in files:
        for suite, other in (checks.run(lambda f=file: load_others(f, list(suites), FLAG)) or {}).items():  # type: ignore[misc]
            if suite in found:
                checks.problems.append(f"{FLAG} {args.reference}: has two results of {suite}. Name one of the files.")
            found[suite] = other
    lm = without_weights(args.model, args.revision, args.chat) if found and hasattr(args, "chat") else None
    for suite, other in found.items() if lm is not None else ():
        module, data = suites[suite]
        checks.run(lambda m=module, d=data, o=other: check_alike(asked(m.parts(lm, d)), o.measured, FLAG))  # type: ignore[misc]
    checks.finish()
    return found


def measured(reference: Reference, asking: Asking, out: Path) -> Gold:
    """Ask the reference what the comparison asks; its model is loaded beside the other for as long as that takes.

    Args:
        asking: of the comparison, for the model that forgets.
        out: of the comparison.

    Raises:
        InputError: results were asked something else.
        NumericalError: the model's numbers are not finite.
    """
    from editunlearn.comparing.asking import TEST
    from editunlearn.evaluation import results
    from editunlearn.evaluation.running import asked
    from editunlearn.lm.fingerprint import model_fingerprint
    from editunlearn.workspace import key_of

    if reference.model is None:
        known: dict[str, Measured] = {suite: other.measured for suite, other in reference.results.items()}
        for suite, found in known.items():  # the demo's tokenizer comes with its weights, so only now of all models
            results.check_alike(asked(asking.suites[suite][0].parts(asking.lm, asking.suites[suite][1])), found, FLAG)
        return Gold(key_of({suite: results.as_json({}, found, {}) for suite, found in known.items()}), known, None)
    lm = load_model(reference.model)
    sha = model_fingerprint(lm)
    own = replace(asking, lm=lm, about={**asking.about, "weights": sha, "model": Path(lm.name).name}, compares=False)
    summary = own.ask(TEST, out / FOLDER, FOLDER, None)
    places = {name: out / FOLDER / folder for name, folder in own.places(TEST).items()}
    asked_of = {name: results.load(place)[1] for name, place in places.items() if place.is_dir()}
    return Gold(sha, asked_of, summary)
