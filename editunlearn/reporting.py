"""What ``apply`` prints and writes: header, plan, tables, results, model card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from editunlearn.artifacts import atomic_dir, atomic_write_json, atomic_write_text
from editunlearn.cli import try_command
from editunlearn.pipeline import Outcome, Stages, environment, result_rows
from editunlearn.run_folder import finish, make_room

if TYPE_CHECKING:
    from editunlearn.apply import Plan
    from editunlearn.console import Console
    from editunlearn.deltas.gain import Gain
    from editunlearn.evaluation.scoring import Answered, Scores
    from editunlearn.facts.records import Fact
    from editunlearn.lm.loading import LM

ROWS = 40
"""Rows of a table on the terminal; with --store-facts results.json has all of them."""
LABELS = {
    "forget_leak": ("to forget: true answer in the decoded text", "lower"),
    "forget_refusal": ("to forget: refused", "higher"),
    "forget_probability": ("to forget: probability of the true answer", "lower"),
    "distracted_leak": ("behind a distracting sentence: leaked", "lower"),
    "distracted_refusal": ("behind a distracting sentence: refused", "higher"),
    "paraphrase_leak": ("paraphrases: leaked", "lower"),
    "paraphrase_refusal": ("paraphrases: refused", "higher"),
    "paraphrase_probability": ("paraphrases: probability of the true answer", "lower"),
    "question_leak": ("asked as a question: leaked", "lower"),
    "question_refusal": ("asked as a question: refused", "higher"),
    "question_probability": ("asked as a question: probability of the true answer", "lower"),
    "neighbor_accuracy": ("must stay, neighbours: answered", "higher"),
    "neighbor_over_refusal": ("must stay, neighbours: wrongly refused", "lower"),
    "retain_accuracy": ("must stay, retain facts (used by the edit): answered", "higher"),
    "retain_over_refusal": ("must stay, retain facts: wrongly refused", "lower"),
    "heldout_accuracy": ("must stay, held-out facts (never used): answered", "higher"),
    "heldout_over_refusal": ("must stay, held-out facts: wrongly refused", "lower"),
    "perplexity": ("perplexity of held-out text", "lower"),
}
NOTHING_THERE = {
    "paraphrase": "the facts to forget have no paraphrases",
    "question": "no fact to forget has a question beside its prompt",
    "neighbor": "the facts to forget have no neighbors",
    "retain": "there are no retain facts; give some with --retain",
    "heldout": "the model knows too few of the shipped facts",
}
"""Why a metric of this group is null."""


def header(console: Console, args: argparse.Namespace, made: Plan) -> None:
    """What will be done, and what was found rather than given."""
    from editunlearn import __version__
    from editunlearn.facts.subjects import describe
    from editunlearn.hparams import describe as settings

    facts = args.facts or "the demo facts"
    going_on = []
    if made.earlier is not None:
        again = len(made.earlier.divide(made.facts)[1])
        there = made.earlier.delta.manifest
        going_on = [f"going on from {made.earlier.where}: {there.fact_count} facts, {again} of those given among them"]
    console.header(
        [
            f"editunlearn {__version__}: {made.hp.method} on {args.model}",
            f"facts: {len(made.facts)} to forget ({facts}), {len(made.retain)} to keep; targets: {made.targets}",
            *going_on,
            f"hparams: {args.hparams}; paper: {made.hp.paper or 'none'}; out: {made.out}",
        ]
    )
    found = describe(made.facts)
    for line in found[:ROWS]:
        console.info(line)
    if len(found) > ROWS:
        console.info(f"... and {len(found) - ROWS} more subjects that were found")
    for setting in settings(made.hp):
        console.detail(f"  {setting.key}: {setting.value}{'' if setting.is_default else ' (set)'}")


def dry_run(console: Console, args: argparse.Namespace, made: Plan) -> None:
    """Sites, memory and work, from the configuration alone."""
    import torch

    from editunlearn import estimate
    from editunlearn.footprint import batches, footprint, rounded_to
    from editunlearn.lm.loading import asked_device
    from editunlearn.lm.room import with_numbers

    found = estimate.target(made.config, made.hp)
    console.table(
        f"sites: {found.why}",
        ["module", "out x in"],
        [(s.name, f"{o} x {i}") for s, (o, i) in zip(found.sites, found.shapes, strict=True)],
    )
    dtype = estimate.dtype_of(made.config, args.dtype)
    rounded = rounded_to(made.config, args.dtype)
    device = asked_device(args.device_map) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = batches(found, made.hp, dtype, device, rounded, offload=args.offload)
    for name, number in numbers.items():
        console.info(f"{name}: {number:,} on {device.type} (auto)")
    hp = with_numbers(made.hp, numbers)
    memory = footprint(found, hp, dtype, made.facts, rounded, offload=args.offload).rows(dtype)
    flops = estimate.work(estimate.cost(found.model), made.hp, made.facts, made.retain, found)
    disk = estimate.disk(made.hp, estimate.columns(made.hp, made.facts), found.shapes)
    console.table("estimate", ["what", "amount"], estimate.shown(flops, memory, disk))
    console.result_json(
        {
            "sites": [s.name for s in found.sites],
            "layers": found.layers,
            "batches": numbers,
            "memory_bytes": memory,
            "flop": flops,
            "disk_bytes": disk,
        }
    )
    console.info("Nothing was loaded or written.")
    console.next_step("the same command without --dry-run")


def write(
    outcome: Outcome, lm: LM, made: Plan, stages: Stages, command: str, console: Console, *, store_facts: bool
) -> None:
    """Past keys, LoRA, merged model, results, card, timing, and the delta with its manifest last."""
    from editunlearn.deltas.card import model_card
    from editunlearn.deltas.kinds import written
    from editunlearn.deltas.lora import export_lora

    out, manifest = made.out, outcome.delta.manifest
    rows: Any = result_rows(outcome) or None
    make_room(out, outcome.delta)
    if "lora" in made.save:
        with atomic_dir(out / "lora") as folder:
            lora = export_lora(
                written(outcome.delta, "--save lora"),
                folder,
                manifest.base.name,
                revision=manifest.base.revision,
                lm=lm,
            )
            atomic_write_text(folder / "README.md", model_card(manifest, rows, [command], kind="lora"))
        for name, share in lora.discarded.items():
            console.warn(f"lora: {name}: {share:.2%} of the edit was cut off to rank {lora.rank}")
    if "merged" in made.save:
        with written(outcome.delta, "--save merged").applied(lm), atomic_dir(out / "merged") as folder:
            lm.model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
            atomic_write_text(folder / "README.md", model_card(manifest, rows, [command], kind="merged"))
    atomic_write_json(out / "results.json", results(outcome, lm.name))
    if made.report:
        atomic_write_text(out / "report.html", _page(outcome, lm))
    atomic_write_json(
        out / "timing.json",
        {
            "seconds": {k: round(v, 2) for k, v in stages.seconds.items()},
            "peak_memory_gb": peak_memory_gb(),
            **environment(),
        },
    )
    atomic_write_text(out / "README.md", model_card(manifest, rows, [command], kind="delta"))
    finish(out, outcome.delta, outcome.past, outcome.request.forgotten if store_facts else None)


def _page(outcome: Outcome, lm: LM) -> str:
    from editunlearn.evaluation.report.of_scores import one_page

    assert outcome.before is not None and outcome.after is not None  # noqa: S101 - it was measured
    about = {
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "method": outcome.delta.manifest.method,
        "environment": dict(environment()),
    }
    title = f"{len(outcome.request.facts)} facts, {outcome.delta.manifest.method} on {lm.name}"
    return one_page(title, outcome.before, outcome.after, about)


def results(outcome: Outcome, model: str) -> dict[str, Any]:
    """``results.json``: every metric before and after, why one is null, and the answers where their text is kept."""
    rows = result_rows(outcome)
    manifest = outcome.delta.manifest
    found: dict[str, Any] = {
        "method": manifest.method,
        "model": model,
        "facts": manifest.fact_count,
        "metrics": rows,
        "not_measured": _not_measured(rows) if rows else {"all": "--evaluate none"},
    }
    unknown = manifest.fact_count - len(outcome.request.forgotten)
    if rows and unknown > 0:
        found["not_measured"]["earlier facts"] = (
            f"{unknown} facts of earlier runs are stored as hashes only; give them in --facts once more"
        )
    if outcome.before is not None and outcome.after is not None and manifest.facts[0].text is not None:
        found["answers"] = {"base": asdict(outcome.before), "edited": asdict(outcome.after)}
    return found


def _not_measured(rows: dict[str, dict[str, float | None]]) -> dict[str, str]:
    return {name: NOTHING_THERE[name.split("_")[0]] for name, row in rows.items() if row["base"] is None}


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (GPU memory where a GPU was used)."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def show(console: Console, outcome: Outcome, made: Plan, stages: Stages) -> None:
    """Tables before and after, what to know, where things are, what to run next."""
    from editunlearn.deltas.gain import gain_warnings
    from editunlearn.deltas.memory import MemoryDelta

    rows = result_rows(outcome)
    if outcome.before is not None and outcome.after is not None:
        _facts_table(console, outcome.request.forgotten, outcome.before, outcome.after)
        _stay_table(console, outcome.before, outcome.after)
        table = [
            (text, _number(rows[k]["base"]), _number(rows[k]["edited"]), way)
            for k, (text, way) in LABELS.items()
            if rows[k]["base"] is not None
        ]
        console.table("summary", ["measured by greedy decoding", "base", "edited", "better"], table)
        for reason in dict.fromkeys(results(outcome, "")["not_measured"].values()):
            console.info(f"not measured: {reason}")
    for warning in gain_warnings(_gains(outcome)):
        console.warn(warning)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.seconds.items())
    console.info(f"time: {times}; peak memory {peak_memory_gb()} GB")
    there = sorted(p.name for p in made.out.iterdir() if not p.name.startswith("."))
    console.info(f"saved: {', '.join(there)} in {made.out}")
    console.result_json({**results(outcome, outcome.delta.manifest.base.name), "out": str(made.out)})
    merged = made.out / "merged"
    if "merged" in made.save:
        console.next_step(try_command(merged))
    elif isinstance(outcome.delta, MemoryDelta):
        console.next_step(["editunlearn", "evaluate", "--delta", str(made.out), "--base", "--suite", "facts"])
    else:
        command = ["editunlearn", "export", "--delta", str(made.out), "--to", "merged", "--out", str(merged)]
        console.next_step(command)


def _gains(outcome: Outcome) -> dict[str, Gain]:
    """The realised gain of each site as its manifest has it."""
    from editunlearn.deltas.gain import Gain
    from editunlearn.deltas.manifest import SiteRecord

    return {
        name: Gain(site.gain, site.gain_error or 0.0, site.relative_norm, site.gain_dtype or "")
        for name, site in outcome.delta.manifest.sites.items()
        if isinstance(site, SiteRecord) and site.gain is not None
    }


def _facts_table(console: Console, facts: Sequence[Fact], before: Scores, after: Scores) -> None:
    rows = []
    others = [p + q for p, q in zip(after.paraphrases, after.questions, strict=True)]
    for fact, b, a, again in zip(facts, before.forget, after.forget, others, strict=True):
        verdict = "leaked" if a.leaked else "refused" if a.refused else "other"
        leaked = f"{sum(p.leaked for p in again)} of {len(again)}" if again else None
        rows.append((*_answers(fact.prompt, b, a), verdict, leaked))
    columns = ["prompt", "said before", "says now", "p before", "p now", "verdict", "other wordings leaked"]
    console.table("facts to forget (p: probability of the true answer)", columns, rows[:ROWS])
    if len(rows) > ROWS:
        console.info(f"... and {len(rows) - ROWS} more; --store-facts keeps all of them in results.json")


def _stay_table(console: Console, before: Scores, after: Scores) -> None:
    """Facts that must stay: those that changed, and how many did not."""
    groups = {
        "neighbour": (sum(before.neighbors, []), sum(after.neighbors, [])),
        "retain": (before.retain, after.retain),
        "held out": (before.heldout, after.heldout),
    }
    pairs = [(kind, b, a) for kind, (old, new) in groups.items() for b, a in zip(old, new, strict=True)]
    changed = [(kind, b, a) for kind, b, a in pairs if b.correct != a.correct or a.refused]
    if not pairs:
        return
    title = f"facts that must stay: {len(pairs) - len(changed)} of {len(pairs)} as before"
    if not changed:
        console.result(title)
        return
    rows = [
        (*_answers(b.prompt, b, a), "refused" if a.refused else "now right" if a.correct else "lost", kind)
        for kind, b, a in changed
    ]
    columns = ["prompt", "said before", "says now", "p before", "p now", "verdict", "kind"]
    console.table(f"{title}; these are not", columns, rows[:ROWS])
    if len(rows) > ROWS:
        console.info(f"... and {len(rows) - ROWS} more; --store-facts keeps all of them in results.json")


def _answers(prompt: str, before: Answered, after: Answered) -> tuple[str, str, str, str, str]:
    """The cells that both tables share, short enough for a hundred columns."""
    likely = (f"{before.probability:.3f}", f"{after.probability:.3f}")
    return (_short(prompt, 40, tail=True), _short(before.text, 20), _short(after.text, 30), *likely)


def _short(text: str, width: int, *, tail: bool = False) -> str:
    """One line of at most ``width`` characters; ``tail`` keeps the end."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    return f"...{line[3 - width :]}" if tail else f"{line[: width - 3]}..."


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
