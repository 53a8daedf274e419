"""The model card."""

from __future__ import annotations

from typing import Any

import delta_samples as samples
import pytest
import tiny
import yaml

from editunlearn.deltas.card import model_card
from editunlearn.deltas.manifest import Manifest


def _manifest(name: str = "org/model", *, store_facts: bool = False, **base: Any) -> Manifest:
    manifest = samples.delta(tiny.lm("llama"), store_facts=store_facts).manifest
    return manifest.model_copy(update={"base": manifest.base.model_copy(update={"name": name, **base})})


def _header(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    return yaml.safe_load(header)


def test_header_is_what_the_hub_reads() -> None:
    card = model_card(_manifest(revision="abc"), None, [])
    assert card.startswith("---\n")
    header = _header(card)
    assert header["base_model"] == "org/model"
    assert header["base_model_relation"] == "finetune"
    assert "unlearning" in header["tags"]
    lora = _header(model_card(_manifest(), None, [], kind="lora"))
    assert (lora["library_name"], lora["base_model_relation"]) == ("peft", "adapter")


def test_a_local_path_is_not_published() -> None:
    for path in ("/home/ann/models/secret-project/llama", r"C:\models\llama", "../models/llama"):
        card = model_card(_manifest(path), None, [])
        assert "base_model" not in _header(card)
        assert "ann" not in card
        assert "models" not in card
        assert "llama" in card


def test_facts_are_counted_and_shown_only_when_stored() -> None:
    private = model_card(_manifest(), None, [])
    assert "4 facts" in private
    assert "secret of" not in private
    assert "ada-1" not in private
    public = model_card(_manifest(store_facts=True), None, [])
    assert "| The secret of ada-1 is | word ada-1 |" in public


def test_results_method_and_commands_are_shown() -> None:
    rows = {
        "leak_rate": {"base": 0.91234567, "edited": 0.0, "reference": None},
        "a|b": {"base": 3, "note": "x\ny"},
    }
    card = model_card(_manifest(), rows, ["python -m editunlearn.apply --hparams memit"])
    assert "| metric | base | edited | reference | note |" in card
    assert "| leak_rate | 0.9123 | 0 | not measured | not measured |" in card
    assert "| a\\|b | 3 | not measured | not measured | x y |" in card
    assert "python -m editunlearn.apply --hparams memit" in card
    assert "steps: 20" in card
    assert "refusal" in card
    assert "`model.layers.0.mlp.down_proj` | 4 | 10.000% | 1 | float32 |" in card
    assert "Nothing was measured" in model_card(_manifest(), None, [])


def test_limits_claim_no_more_than_was_shown() -> None:
    card = model_card(_manifest(), None, [])
    assert "**suppressed**, not erased" in card
    assert "by subtraction" in card
    assert "Publish merged weights only" in card
    attacked = model_card(_manifest(), None, [], attacks=["relearning, 20 steps", "4-bit"])
    assert "suppressed" not in attacked
    assert "survived: relearning, 20 steps, 4-bit" in attacked


@pytest.mark.parametrize(
    ("kind", "load", "undo"),
    [
        ("merged", 'from_pretrained("DIR")', "delta.negated()"),
        (
            "lora",
            'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/model"',
            "disable_adapter",
        ),
        ("delta", 'load("DIR").applied(lm)', "bit for bit"),
    ],
)
def test_how_to_load_and_how_to_undo(kind: Any, load: str, undo: str) -> None:
    card = model_card(_manifest(), None, [], kind=kind)
    assert load in card
    assert undo in card
