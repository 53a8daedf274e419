"""What ``apply`` prints and writes: header, plan, tables, results, model card."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.artifacts import atomic_dir, atomic_write_json, atomic_write_text
from editunlearn.errors import InputError
from editunlearn.pipeline import Outcome, Stages, environment, result_rows

if TYPE_CHECKING:
    from editunlearn.apply import Plan
    from editunlearn.console import Console
    from editunlearn.deltas.gain import Gain
    from editunlearn.evaluation.scoring import Answered
    from editunlearn.lm.loading import LM

ROWS = 40
"""Facts in the table on the terminal; results.json has all of them with --store-facts."""
LABELS = {
    "forget_leak": ("to forget: true answer in the decoded text", "lower"),
    "forget_refusal": ("to forget: refused", "higher"),
    "forget_probability": ("to forget: probability of the true answer", "lower"),
    "distracted_leak": ("behind a distracting sentence: leaked", "lower"),
    "distracted_refusal": ("behind a distracting sentence: refused", "higher"),
    "paraphrase_leak": ("paraphrases: leaked", "lower"),
    "paraphrase_refusal": ("paraphrases: refused", "higher"),
    "paraphrase_probability": ("paraphrases: probability of the true answer", "lower"),
    "neighbor_accuracy": ("must stay, neighbours: answered", "higher"),
    "neighbor_over_refusal": ("must stay, neighbours: wrongly refused", "lower"),
    "retain_accuracy": ("must stay, retain facts (used by the edit): answered", "higher"),
    "heldout_accuracy": ("must stay, held-out facts (never used): answered", "higher"),
    "heldout_over_refusal": ("must stay, held-out facts: wrongly refused", "lower"),
    "perplexity": ("perplexity of held-out text", "lower"),
}


def header(console: Console, args: argparse.Namespace, made: Plan) -> None:
    """What will be done, and what was found rather than given."""
    from editunlearn import __version__
    from editunlearn.facts.subjects import describe

    facts = args.facts or "the demo facts"
    console.header(
        [
            f"editunlearn {__version__}: {made.hp.method} on {args.model}",
            f"facts: {len(made.facts)} to forget ({facts}), {len(made.retain)} to keep; targets: {args.targets}",
            f"hparams: {args.hparams}; paper: {made.hp.paper or 'none'}; out: {made.out}",
        ]
    )
    found = describe(made.facts)
    for line in found[:ROWS]:
        console.info(line)
    if len(found) > ROWS:
        console.info(f"... and {len(found) - ROWS} more subjects that were found")
    for name in sorted(set(asdict_flat(made.hp.model_dump()))):
        console.detail(f"  {name}: {asdict_flat(made.hp.model_dump())[name]}")


def asdict_flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= asdict_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def dry_run(console: Console, made: Plan) -> None:
    """Sites, memory and work, from the configuration alone."""
    from editunlearn import editors
    from editunlearn.lm.layout import layout_of, resolve_layers
    from editunlearn.lm.sources import estimate, meta_model

    model = meta_model(made.config)
    layout = layout_of(model, made.config)
    layers, why = resolve_layers(
        made.hp.layers, layout.num_layers(model), editors.module(made.hp.method).DEFAULT_LAYERS
    )
    sites = layout.sites(layers)
    shapes = [tuple(layout.read_weight(model, s.name).shape) for s in sites]
    size = estimate(made.config)
    console.table(
        "sites", ["module", "out x in"], [(s.name, f"{o} x {i}") for s, (o, i) in zip(sites, shapes, strict=True)]
    )
    console.table("estimate", ["what", "amount"], _needs(made, size.parameters, shapes))
    console.result(f"layers: {layers} ({why}). Nothing was loaded or written.")
    console.next_step("the same command without --dry-run")


def _needs(made: Plan, parameters: int, shapes: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """Memory and floating-point work of the stages; 2 operations a parameter and token forward, 4 backward."""
    hp, n = made.hp, len(made.facts)
    widest = max(i for _, i in shapes)
    contexts = hp.context_prefixes.count + 1
    per_prompt = 24 + hp.context_prefixes.tokens
    value = 6 * parameters * n * contexts * per_prompt * hp.value.steps
    refine = 0
    if hp.refine is not None:
        r = hp.refine
        tokens = min(n, r.forget_batch) * r.contexts * per_prompt + r.retain_batch * 16 + r.text_batch * r.text_length
        refine = 6 * parameters * tokens * r.steps
    moments = 2 * parameters * hp.moments.tokens * max(1, len(shapes)) // max(1, len(shapes))
    rows = {
        "model in bfloat16": _gigabytes(2 * parameters),
        "second moments (all sites, float64)": _gigabytes(sum(8 * i * i for _, i in shapes)),
        "one solve": _gigabytes(3 * 8 * widest * widest),
        "delta on disk": _gigabytes(sum(4 * n * (o + i) for o, i in shapes)),
        "second moments, once per model": f"{moments / 1e12:,.1f} TFLOP",
        "values": f"{value / 1e12:,.1f} TFLOP",
        "refine": f"{refine / 1e12:,.1f} TFLOP",
        "time at 0.3 TFLOP/s (2 cores, bfloat16)": f"about {(moments + value + refine) / 0.3e12 / 60:,.0f} min",
        "time at 300 TFLOP/s (one large GPU)": f"about {(moments + value + refine) / 300e12:,.0f} s",
    }
    return list(rows.items())


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def refuse_other_run(made: Plan, args: argparse.Namespace) -> None:
    """A finished delta of another request in --out is not replaced without being asked.

    Raises:
        InputError: there is one.
    """
    from editunlearn.deltas.manifest import fact_set
    from editunlearn.facts.targets import fill_targets

    path = made.out / "delta.json"
    if args.force or not path.is_file():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["facts"][0]["sha256"]
    except (ValueError, KeyError, IndexError, TypeError):
        there = None
    pool = [*made.facts, *made.retain] if args.targets == "random" else None
    if there != fact_set(fill_targets(made.facts, args.targets, seed=made.hp.seed, pool=pool)).sha256:
        raise InputError(
            f"--out {made.out}: holds the finished run of another request. Choose another folder, or give --force."
        )


def write(outcome: Outcome, lm: LM, made: Plan, stages: Stages, command: str) -> None:
    """Everything beside the delta itself: past keys, LoRA, merged model, results, card, timing."""
    from editunlearn.deltas.card import model_card
    from editunlearn.deltas.lora import export_lora
    from editunlearn.deltas.manifest import Manifest

    out = made.out
    manifest: Manifest = outcome.delta.manifest
    rows: Any = result_rows(outcome) or None
    outcome.past.save(out / "past_keys.safetensors")
    if "lora" in made.save:
        name = manifest.base.name
        with atomic_dir(out / "lora") as folder:
            export_lora(outcome.delta, folder, name, revision=manifest.base.revision, lm=lm)
            atomic_write_text(folder / "README.md", model_card(manifest, rows, [command], kind="lora"))
    if "merged" in made.save:
        with outcome.delta.applied(lm), atomic_dir(out / "merged") as folder:
            lm.model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
            atomic_write_text(folder / "README.md", model_card(manifest, rows, [command], kind="merged"))
    results: dict[str, Any] = {
        "method": made.hp.method,
        "model": lm.name,
        "facts": len(made.facts),
        "metrics": rows or {},
    }
    if outcome.before is not None and outcome.after is not None and manifest.facts[0].text is not None:
        results["answers"] = {"base": _plain(outcome.before), "edited": _plain(outcome.after)}
    atomic_write_json(out / "results.json", results)
    atomic_write_json(
        out / "timing.json",
        {
            "seconds": {k: round(v, 2) for k, v in stages.seconds.items()},
            "peak_memory_gb": peak_memory_gb(),
            **environment(),
        },
    )
    atomic_write_text(out / "README.md", model_card(manifest, rows, [command], kind="delta"))


def _plain(scores: Any) -> dict[str, Any]:
    return asdict(scores)


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (GPU memory where a GPU was used)."""
    import resource

    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def show(console: Console, outcome: Outcome, made: Plan, stages: Stages) -> None:
    """Tables before and after, what to know, where things are, what to run next."""
    from editunlearn.deltas.gain import gain_warnings

    rows = result_rows(outcome)
    if rows:
        _facts_table(console, outcome)
        _stay_table(console, outcome)
        table = [
            (text, _number(rows[k]["base"]), _number(rows[k]["edited"]), way)
            for k, (text, way) in LABELS.items()
            if k in rows
        ]
        console.table("summary", ["measured by greedy decoding", "base", "edited", "better"], table)
    for warning in gain_warnings(_gains(outcome)):
        console.warn(warning)
    times = ", ".join(f"{name} {seconds:.0f}s" for name, seconds in stages.seconds.items())
    console.info(f"time: {times}; peak memory {peak_memory_gb()} GB")
    console.info(
        f"saved: {', '.join(sorted(p.name for p in made.out.iterdir() if not p.name.startswith('.')))} in {made.out}"
    )
    console.result_json({"method": made.hp.method, "facts": len(made.facts), "out": str(made.out), "metrics": rows})
    if "merged" in made.save:
        console.next_step(
            [
                "python",
                "-c",
                f"from transformers import pipeline; print(pipeline('text-generation', '{made.out / 'merged'}')('...'))",
            ]
        )
    else:
        console.next_step(
            [
                "editunlearn",
                "export",
                "--delta",
                str(made.out),
                "--to",
                "merged",
                "--out",
                str(Path(made.out) / "merged"),
            ]
        )


def _gains(outcome: Outcome) -> dict[str, Gain]:
    """The realised gain of each site as its manifest has it."""
    from editunlearn.deltas.gain import Gain

    sites = outcome.delta.manifest.sites
    return {
        name: Gain(site.gain, site.gain_error or 0.0, site.relative_norm, site.gain_dtype or "")
        for name, site in sites.items()
        if site.gain is not None
    }


def _facts_table(console: Console, outcome: Outcome) -> None:
    assert outcome.before is not None and outcome.after is not None  # noqa: S101 - the caller checked
    rows = []
    parts = zip(
        outcome.request.facts, outcome.before.forget, outcome.after.forget, outcome.after.paraphrases, strict=True
    )
    for fact, before, after, paraphrases in parts:
        again = f"{sum(a.leaked for a in paraphrases)}/{len(paraphrases)}" if paraphrases else "-"
        refused = f"{sum(a.refused for a in paraphrases)}/{len(paraphrases)}" if paraphrases else "-"
        rows.append(
            (
                fact.prompt,
                f"{before.probability:.3f}",
                f"{after.probability:.3f}",
                _short(before.text),
                _short(after.text),
                _verdict(after),
                again,
                refused,
            )
        )
    columns = ["prompt", "p before", "p after", "said before", "says now", "verdict", "paraphrases leaked", "refused"]
    console.table("facts to forget", columns, rows[:ROWS])
    if len(rows) > ROWS:
        console.info(f"... and {len(rows) - ROWS} more; --store-facts keeps all of them in results.json")


def _stay_table(console: Console, outcome: Outcome) -> None:
    """Facts that must stay: all neighbours and retain facts that changed, and how many did not."""
    assert outcome.before is not None and outcome.after is not None  # noqa: S101 - the caller checked
    before, after = outcome.before, outcome.after
    pairs = [
        *(
            (b, a, "neighbour")
            for x, y in zip(before.neighbors, after.neighbors, strict=True)
            for b, a in zip(x, y, strict=True)
        ),
        *((b, a, "retain") for b, a in zip(before.retain, after.retain, strict=True)),
        *((b, a, "held out") for b, a in zip(before.heldout, after.heldout, strict=True)),
    ]
    changed = [(b, a, kind) for b, a, kind in pairs if b.correct != a.correct or a.refused]
    rows = [
        (kind, b.prompt, f"{b.probability:.3f}", f"{a.probability:.3f}", _short(b.text), _short(a.text), _verdict(a))
        for b, a, kind in changed
    ]
    columns = ["kind", "prompt", "p before", "p after", "said before", "says now", "verdict"]
    title = f"facts that must stay: {len(pairs) - len(changed)} of {len(pairs)} as before; these changed"
    console.table(title, columns, rows[:ROWS] or [("-", "none", "", "", "", "", "")])


def _verdict(answer: Answered) -> str:
    if answer.leaked:
        return "leaked" if not answer.correct else "answered"
    return "refused" if answer.refused else "other"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
