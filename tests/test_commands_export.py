"""export: merged models, LoRA, smaller and composed deltas; what apply --save wrote is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MODEL_FILES, Called, World, build, call, finish, listing
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from editunlearn.deltas.files import load as load_delta
from editunlearn.lm.loading import load

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("export") / "world")


@pytest.fixture(scope="module")
def finished(world: World) -> tuple[Path, Called]:
    return finish(world)


def _logits(model: Any, folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def _applied_logits(world: World, run: Path) -> torch.Tensor:
    lm = load(world.model)
    with load_delta(run, lm).applied(lm):
        return _logits(lm.model, world.model)


def test_merged_is_the_model_with_the_delta(world: World, finished: tuple[Path, Called]) -> None:
    out = finished[0]
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    wanted = _applied_logits(world, out)
    assert torch.equal(_logits(merged, out / "merged"), wanted)
    base = AutoModelForCausalLM.from_pretrained(world.model)
    assert not torch.allclose(_logits(base, world.model), wanted, atol=1e-3)


def test_lora_is_the_model_with_the_delta(world: World, finished: tuple[Path, Called]) -> None:
    from peft import PeftModel

    out = finished[0]
    base = AutoModelForCausalLM.from_pretrained(world.model)
    adapted = PeftModel.from_pretrained(base, out / "lora")
    torch.testing.assert_close(_logits(adapted, world.model), _applied_logits(world, out), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", [[], ["--base"]])
def test_export_merged(world: World, finished: tuple[Path, Called], tmp_path: Path, way: list[str]) -> None:
    out = finished[0]
    base = [*way, str(world.model)] if way else []
    called = call("export", "--delta", str(out), "--to", "merged", "--out", str(tmp_path / "m"), *base)
    assert called.code == 0, called.err
    assert listing(tmp_path / "m") == MODEL_FILES | {"README.md"}
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "m", out / "merged"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_export_reverts_a_merge(world: World, finished: tuple[Path, Called], tmp_path: Path) -> None:
    out = finished[0]
    called = call(
        *("export", "--delta", str(out), "--revert", "--base", str(out / "merged"), "--to", "merged"),
        *("--out", str(tmp_path / "restored")),
    )
    assert called.code == 0, called.err
    base, restored = (load_file(f / "model.safetensors") for f in (world.model, tmp_path / "restored"))
    for name in base:
        torch.testing.assert_close(restored[name], base[name], atol=1e-5, rtol=1e-5)


def test_export_lora_and_delta(world: World, finished: tuple[Path, Called], tmp_path: Path) -> None:
    out = finished[0]
    called = call("export", "--delta", str(out), "--to", "lora", "--out", str(tmp_path / "lora"))
    assert called.code == 0 and "--max-lora-rank 8" in called.out
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "lora", out / "lora"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    smaller = call(
        *("export", "--delta", str(out), "--without", "france", "--to", "delta", "--out", str(tmp_path / "one"))
    )
    assert smaller.code == 0, smaller.err
    assert load_delta(tmp_path / "one").rank == 1 and "delta with 1 facts" in smaller.out
    compose = ["export", "--delta", str(tmp_path / "one"), "--to", "delta", "--out", str(tmp_path / "both"), "--json"]
    twice = call(*compose, "--compose", str(out))
    assert twice.code == 2 and f"{out}: holds 1 facts that {tmp_path / 'one'} holds as well" in twice.err
    other = ["--without", "darrieux", "--to", "delta", "--out", str(tmp_path / "two")]
    assert call("export", "--delta", str(out), *other).code == 0
    both = call(*compose, "--compose", str(tmp_path / "two"))
    assert both.code == 0, both.err
    assert json.loads(both.out) == {"facts": 2, "sites": 1, "rank": 2}


def test_export_replaces_nothing_and_dry_runs(finished: tuple[Path, Called], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    flags = ["--delta", str(finished[0]), "--to", "merged", "--out"]
    called = call("export", *flags, str(tmp_path / "mine"))
    assert called.code == 2 and "not empty" in called.err
    assert listing(tmp_path) == {"mine/thesis.txt"}
    called = call("export", *flags, str(tmp_path / "new"), "--dry-run", "--json")
    assert called.code == 0 and json.loads(called.out)["would_write"] == "merged"
    assert listing(tmp_path) == {"mine/thesis.txt"}
    called = call("export", "--delta", str(tmp_path), "--to", "lora", "--base", "b", "--out", str(tmp_path / "mine"))
    assert called.code == 2 and len(called.err.splitlines()) == 3  # no delta, not empty, --base without a merge
