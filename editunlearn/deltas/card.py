"""README.md of an artifact: what was asked, how, what was measured, what is not claimed, how to undo it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from editunlearn.deltas.manifest import BaseManifest, DenseManifest, Manifest, MemoryManifest, SiteRecord

Kind = Literal["merged", "lora", "delta", "standalone"]
Value = float | int | str | None
Rows = Mapping[str, Mapping[str, Value]]

# Only a hub id may be named as the base model: a path on the author's machine is nobody's business.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def model_card(
    manifest: Manifest | DenseManifest | MemoryManifest,
    results: Rows | None,
    how: Sequence[str],
    *,
    kind: Kind = "merged",
    attacks: Sequence[str] = (),
    cost: Rows | None = None,
) -> str:
    """The text of the card, Markdown behind a YAML header as the hub reads it.

    Args:
        manifest: of the delta. Facts appear as a count, and as text only when the manifest stores their text.
        results: by metric, the columns of its row, for example ``{"leak_rate": {"base": 0.9, "edited":
            0.0}}``; None in a cell is printed as "not measured". None for all: nothing was measured.
        how: the command lines that made the artifact.
        kind: what is in the folder.
        attacks: attacks that were run and that the edit survived; without any the card says "suppressed".
        cost: of a memory, what it was measured to take; rows as in ``results``.
    """
    parts = [
        _header(manifest, kind),
        "# "
        + (
            f"{_base(manifest)}, edited with {manifest.method}"
            if kind in ("merged", "standalone")
            else f"{kind}: {manifest.method}"
        ),
        _asked(manifest),
        _method(manifest, how),
        "## Measured\n\n" + (_table(results) if results else "Nothing was measured."),
        _cost(manifest, cost) if isinstance(manifest, MemoryManifest) else _gain(manifest),
        _limits(manifest, attacks),
        _load(manifest, kind),
        _undo(manifest, kind),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _header(manifest: BaseManifest, kind: Kind) -> str:
    header: dict[str, Any] = {
        "library_name": "peft" if kind == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["editunlearn", "model-editing", "unlearning", manifest.method],
    }
    if _is_hub_id(manifest.base.name):
        header["base_model"] = manifest.base.name
        header["base_model_relation"] = "adapter" if kind == "lora" else "finetune"
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _base(manifest: BaseManifest) -> str:
    name = manifest.base.name
    return name if _is_hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _edited(manifest: BaseManifest) -> str:
    return f"{_base(manifest)}, edited with {manifest.method}"


def _is_hub_id(name: str) -> bool:
    if name == "demo":  # ours, made of PyPI packages
        return False
    return _HUB_ID.fullmatch(name) is not None


def _asked(manifest: BaseManifest) -> str:
    count = manifest.fact_count
    removed = sum(len(part.removed) for part in manifest.facts)
    lines = [
        "## What was asked",
        "",
        f"To stop the model from saying {count} fact{'s' if count != 1 else ''}, and to answer with "
        f"`{manifest.target_strategy}` instead."
        + (f" {removed} more had been asked for and were taken out again." if removed else ""),
    ]
    texts = [fact for part in manifest.facts for fact in part.text or ()]
    if texts:
        lines += ["", "| prompt | answer |", "|---|---|"]
        lines += [f"| {_cell(fact.get('prompt'))} | {_cell(fact.get('answer'))} |" for fact in texts]
    else:
        lines += [
            "",
            "A list of things to forget is itself private: the artifact holds salted hashes of the facts only.",
        ]
    return "\n".join(lines)


def _method(manifest: Manifest | DenseManifest | MemoryManifest, how: Sequence[str]) -> str:
    base, sites = manifest.base, manifest.sites
    revision = f" at revision `{base.revision}`" if base.revision else ""
    settings = yaml.safe_dump({"method": manifest.method, **manifest.hparams}, sort_keys=False, allow_unicode=True)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    seeds = ", ".join(f"{name} {seed}" for name, seed in manifest.seeds.items()) or "none"
    if isinstance(manifest, MemoryManifest):
        entries = sum(len(site.entries) for site in manifest.sites.values())
        what = f"no weights changed, {entries} entries of memory beside {len(sites)} matrices"
    elif isinstance(manifest, DenseManifest):
        entries = sum(site.changed for site in manifest.sites.values())
        numbers = sum(site.shape[0] * site.shape[1] for site in manifest.sites.values())
        what = f"{len(sites)} matrices changed, {entries:,} of their {numbers:,} entries"
    else:
        rank = max((site.rank for site in manifest.sites.values()), default=0)
        what = f"{len(sites)} matrices changed, rank at most {rank}"
    lines = [
        "## Method",
        "",
        f"`{manifest.method}` on {_base(manifest)}{revision} ({base.model_type}): {what}. "
        f"Seeds: {seeds}. Versions: {versions}.",
        "",
        f"```yaml\n{settings}```",
    ]
    if how:
        lines += ["", "Made with:", "", "```sh", *how, "```"]
    return "\n".join(lines)


def _table(results: Rows) -> str:
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    lines = ["| metric | " + " | ".join(map(_cell, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for metric, row in results.items():
        lines.append(f"| {_cell(metric)} | " + " | ".join(_number(row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _gain(manifest: Manifest | DenseManifest) -> str:
    lines = [
        "## Realised gain",
        "",
        "How much of each change is left after rounding (1 is all of it; under 0.98 the edit is weakened).",
        "",
        "| module | rank | norm(dW)/norm(W) | gain | stored in |",
        "|---|---|---|---|---|",
    ]
    for name, site in manifest.sites.items():
        size = "not known" if site.relative_norm is None else f"{site.relative_norm:.3%}"
        rank = site.rank if isinstance(site, SiteRecord) else "full"
        gain = f"{_number(site.gain)} | {site.gain_dtype or 'not measured'}"
        lines.append(f"| `{name}` | {rank} | {size} | {gain} |")
    return "\n".join(lines)


def _cost(manifest: MemoryManifest, measured: Rows | None) -> str:
    """What a memory takes while the model is used."""
    lines = [
        "## What it costs to use",
        "",
        "The memory is read where a prompt ends, whatever it is about. FLOP: added to one token of a prompt.",
        "",
        "| module | memory | entries | numbers | MB | FLOP |",
        "|---|---|---|---|---|---|",
    ]
    for name, site in manifest.sites.items():
        lines.append(
            f"| `{name}` | {site.kind} | {len(site.entries)} | {site.nbytes // 4:,} | {site.nbytes / 1e6:.3g} | "
            f"{site.operations:,} |"
        )
    if measured:
        lines += ["", "Measured on the machine that made this folder:", "", _table(measured)]
    return "\n".join(lines)


def _limits(manifest: BaseManifest, attacks: Sequence[str]) -> str:
    if attacks:
        claim = f"The edit was attacked and survived: {', '.join(attacks)}. Other attacks were not tried."
    else:
        claim = (
            "The facts are **suppressed**, not erased: no attack was run. Other wording, fine-tuning, "
            "quantisation or a look at the hidden states may bring them back."
        )
    if isinstance(manifest, MemoryManifest):
        shared = (
            "The knowledge is still in the weights, all of it: the memory covers it up for those who use the model "
            "with it. That suits a model behind an interface. To give weights away, use a method that changes them."
        )
    else:
        shared = (
            "The base model with the delta gives the knowledge back by subtraction: the difference points "
            "at what was to be forgotten. Publish merged weights only, and keep the delta and the LoRA for "
            "audit and rollback. Whoever has the original model needs neither."
        )
    return "\n".join(
        [
            "## Limits",
            "",
            f"- {claim}",
            f"- {shared}",
            f"- The numbers above hold for the {manifest.fact_count} facts and the prompts that were "
            "measured, not for all ways to ask.",
            "- The licence and terms of use of the base model go on to hold.",
        ]
    )


def _load(manifest: BaseManifest, kind: Kind) -> str:
    base = f'"{_base(manifest)}"' + (f', revision="{manifest.base.revision}"' if manifest.base.revision else "")
    code = {
        "merged": "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIR")',
        "standalone": "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)',
        "lora": "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "DIR")',
        "delta": "import editunlearn as eu\nfrom editunlearn.deltas.files import load\n\n"
        f'lm = eu.load({base})\nwith load("DIR").applied(lm):\n    ...',
    }[kind]
    return f"## How to load\n\n```python\n{code}\n```"


def _undo(manifest: BaseManifest, kind: Kind) -> str:
    if kind == "merged":
        text = (
            "Load the base model named above: it was not changed. Or, with the delta at hand, merge its "
            "negative (`merge(lm, delta.negated())`), which is exact up to the rounding of two merges."
            + (
                " To take single facts out again, merge `delta.without([id, ...])` into the base model."
                if manifest.known_ids
                else ""
            )
        )
    elif kind == "standalone":
        text = "Load the base model named above: its weights are in this folder as they came, beside the memory."
    elif kind == "lora":
        text = (
            "Load the base model without the adapter (PEFT: `with model.disable_adapter():`). No base weight "
            "was changed."
        )
    else:
        text = "Leave the `with` block: the model is as before, bit for bit." + (
            " `delta.without([id, ...])` is the delta without single facts." if manifest.known_ids else ""
        )
    return f"## How to undo\n\n{text}"


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _number(value: Value) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else _cell(value)
