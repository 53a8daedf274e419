"""Editing success by layer: the same facts, forgotten with each block by itself, in closed form.

Where tracing finds a fact need not be where an edit works best (Hase et al. 2023, arXiv 2301.04213), so that this is
measured and not inferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.errors import NumericalError
from editunlearn.numerics.ranks import rank_correlation
from editunlearn.tracing.prompts import LAST

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import MethodHParams
    from editunlearn.lm.loading import LM

SHOWN = {
    "forget_leak": "leaked",
    "forget_refusal": "refused",
    "distracted_leak": "leaked, distracted",
    "heldout_accuracy": "held out kept",
    "heldout_over_refusal": "held out refused",
    "perplexity": "perplexity",
}


def run(
    lm: LM,
    facts: Sequence[Fact],
    hp: MethodHParams,
    layers: Sequence[int] | None,
    *,
    cache: Path,
    root: Path | None,
    fresh: bool,
    console: Console,
) -> dict[str, Any]:
    """Forget ``facts`` with each layer, without refine; layers that are done are taken from ``root``.

    Returns:
        ``base`` and ``layers``: for each layer its scores, or None with a reason where the edit had no solution.
    """
    from editunlearn.artifacts import atomic_write_json, cached_json
    from editunlearn.editors import moments
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.facts.targets import DEFAULT_TARGETS
    from editunlearn.hparams import EditorHParams, resolved
    from editunlearn.pipeline import run_inputs, with_targets
    from editunlearn.workspace import key_of

    assert isinstance(hp, EditorHParams)  # noqa: S101 - the command has checked it
    bare = hp.model_copy(update={"refine": None})
    chosen = list(layers or range(lm.layout.num_layers(lm.model)))
    if bare.moments.text != "none":  # one pass over the text for all layers
        moments.get(lm, lm.layout.sites(chosen), bare.moments, cache, console)
    filled = with_targets(lm, facts, DEFAULT_TARGETS, seed=bare.seed, cache=cache, console=console)
    found: dict[str, Any] = {"hparams": resolved(bare), "facts": len(filled), "layers": []}
    with console.progress(len(chosen) + 1, "sweep (layers)") as bar:
        for layer in [None, *chosen]:
            one = bare.model_copy(update={"layers": [layer]}) if layer is not None else bare
            inputs = run_inputs(lm, ForgetRequest(tuple(filled)), one, DEFAULT_TARGETS, None)
            path = root / "sweep" / f"{key_of({**inputs, 'layer': layer})}.json" if root is not None else None
            scores = cached_json(path, dict) if not fresh else None
            if scores is None:
                scores = _measured(lm, filled, one if layer is not None else None, cache, console)
                if path is not None:
                    atomic_write_json(path, scores)
            if layer is None:
                found["base"] = scores
            else:
                found["layers"].append({"layer": layer, **scores})
            bar.update()
    return found


def _measured(lm: LM, facts: Sequence[Fact], hp: MethodHParams | None, cache: Path, console: Console) -> dict[str, Any]:
    """Scores with an edit, or of the model as it is."""
    from contextlib import nullcontext

    from editunlearn.console import Console
    from editunlearn.evaluation import scoring
    from editunlearn.general import general_facts
    from editunlearn.pipeline import forget, perplexity_text

    quiet = Console(quiet=True)
    heldout = general_facts(lm, facts, [], cache, quiet).heldout
    delta = None
    if hp is not None:
        try:
            delta = forget(lm, facts, hp, cache=cache, evaluate=False, console=quiet).delta
        except NumericalError as error:
            return {"scores": None, "reason": str(error)}
    with delta.applied(lm) if delta is not None else nullcontext():
        scores = scoring.measure(lm, facts, [], heldout, perplexity_text(lm)).summary()
    return {"scores": {name: scores[name] for name in SHOWN}, "reason": None}


def agreement(layers: Sequence[Mapping[str, Any]], traced: Mapping[str, Any]) -> dict[str, float | None]:
    """Rank correlation over layers of what tracing says about their MLPs with how well editing them went."""
    cells = traced["kinds"].get("mlp", {}).get("measured", {}).get(LAST)
    done = [one for one in layers if one["scores"] is not None]
    if cells is None:
        return {}
    effects = [cells[one["layer"]][0] for one in done]
    forgotten = [1 - one["scores"]["forget_leak"] for one in done]
    kept = [one["scores"]["heldout_accuracy"] for one in done]
    found = {"effect_with_forgotten": rank_correlation(effects, forgotten)}
    if all(value is not None for value in kept):
        found["effect_with_kept"] = rank_correlation(effects, kept)
        both = [gone + stayed for gone, stayed in zip(forgotten, kept, strict=True)]
        found["effect_with_forgotten_plus_kept"] = rank_correlation(effects, both)
    return found


def show(console: Console, found: Mapping[str, Any]) -> None:
    """A table of all layers."""
    rows = [["base", *_row(found["base"])], *([str(one["layer"]), *_row(one)] for one in found["layers"])]
    console.table("edited with one block alone, in closed form", ["block", *SHOWN.values()], rows)
    for one in found["layers"]:
        if one["reason"]:
            console.result(f"block {one['layer']}: {one['reason']}")
    for name, value in found["agreement_with_tracing"].items():
        shown = "not defined" if value is None else f"{value:.2f}"
        console.result(f"rank correlation over blocks, {name.replace('_', ' ')}: {shown}")


def _row(one: Mapping[str, Any]) -> list[float | None]:
    return [None] * len(SHOWN) if one["scores"] is None else [one["scores"][name] for name in SHOWN]
