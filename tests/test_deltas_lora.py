"""The LoRA export: equal to the delta in PEFT, and within what vLLM accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import delta_samples as samples
import pytest
import tiny
import torch
from safetensors.torch import load_file

from editunlearn.deltas.lora import RANKS, describe_targets, export_lora, pad, truncate
from editunlearn.deltas.lowrank import Factors
from editunlearn.errors import InputError, NumericalError


def _in_peft(lm: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(lm.model, folder).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known_model", [True, False])
@pytest.mark.parametrize("kind", samples.TYPES)
def test_the_adapter_in_peft_is_the_delta(kind: str, known_model: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    lm = tiny.lm(kind, dtype=dtype)
    delta = samples.delta(lm, rank=5, scale=0.5)
    plain = samples.logits(lm.model)
    with delta.applied(lm):
        expected = samples.logits(lm.model)
    export = export_lora(delta, tmp_path, "tiny", lm=lm if known_model else None)
    assert export.discarded == {}
    adapted = _in_peft(lm, tmp_path)
    layers = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in adapted.named_modules()
        if name.endswith("lora_A.default")
    }
    assert layers == set(delta.factors)
    found = samples.logits(adapted)
    # In bfloat16 PEFT rounds the product of every module, and a merge rounds the weight.
    close = 1e-5 if dtype == torch.float32 else 0.05
    assert (found - expected).float().norm() <= close * (expected - plain).float().norm()
    with adapted.disable_adapter():
        assert torch.equal(samples.logits(adapted), plain)


@pytest.mark.parametrize("kind", samples.TYPES)
def test_the_config_keeps_to_what_vllm_reads(kind: str, tmp_path: Path) -> None:
    lm = tiny.lm(kind)
    delta = samples.delta(lm, rank=9)
    export = export_lora(delta, tmp_path, "org/model", revision="abc", lm=lm)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == export.rank == export.max_lora_rank == 16
    assert export.vllm_flags == "--enable-lora --max-lora-rank 16"
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert (config["use_rslora"], config["use_dora"]) == (False, False)
    assert not any(key.endswith("_pattern") and key != "layers_pattern" for key in config)
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "abc")
    assert config["fan_in_fan_out"] is (kind == "gpt2")
    assert config["layers_to_transform"] == [0, 2]
    # GPT-2 has a c_proj in its attention, too: there the name of the MLP has to be said.
    assert config["target_modules"] == [{"gpt2": "mlp.c_proj", "gpt_neox": "dense_4h_to_h"}.get(kind, "down_proj")]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, factors in delta.factors.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert (a.shape, b.shape) == ((16, factors.shape[1]), (factors.shape[0], 16))
        assert torch.equal(b[:, :9], factors.left)
        assert not b[:, 9:].any()
        assert not a[9:].any()


def test_modules_of_different_rank_get_one_rank(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    columns = {
        "model.layers.0.mlp.down_proj": [*["ada-1"] * 9, "bob-1"],
        "model.layers.2.mlp.down_proj": ["bob-1"] * 10,
    }
    delta = samples.delta(lm, rank=10, columns=columns).without(["ada-1"])
    assert [factors.rank for factors in delta.factors.values()] == [1, 10]
    with delta.applied(lm):
        expected = samples.logits(lm.model)
    assert export_lora(delta, tmp_path, "tiny").rank == 16
    assert torch.allclose(samples.logits(_in_peft(lm, tmp_path)), expected, atol=1e-4)


def test_a_rank_above_the_limit_is_cut_off_and_reported(tmp_path: Path) -> None:
    lm = tiny.lm("llama", hidden=48)
    delta = samples.delta(lm, rank=20)
    export = export_lora(delta, tmp_path, "tiny", max_rank=20)  # 16 is the largest size that vLLM has up to 20
    assert export.rank == 16
    assert export.discarded.keys() == delta.factors.keys()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, factors in delta.factors.items():
        dense = (factors.left @ factors.right).double()
        s = torch.linalg.svdvals(dense)
        lost = float(s[16:].square().sum() / s.square().sum())
        assert export.discarded[name] == pytest.approx(lost, rel=1e-6)
        kept = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        assert float((kept - dense).square().sum() / dense.square().sum()) == pytest.approx(lost, rel=1e-3)


def test_truncation_of_more_columns_than_the_matrix_has_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(6, 40, generator=generator), torch.randn(40, 9, generator=generator))
    small, lost = truncate(factors, 8)
    assert lost == pytest.approx(0.0, abs=1e-12)
    assert torch.allclose(small.left @ small.right, factors.left @ factors.right, atol=1e-4)
    assert small.rank == 6
    torch.testing.assert_close(pad(small, 8).left @ pad(small, 8).right, small.left @ small.right)
    nothing, lost = truncate(Factors(torch.zeros(6, 12), torch.zeros(12, 9)), 8)
    assert (lost, nothing.norm()) == (0.0, 0.0)


def test_more_than_512_columns(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm, rank=600, columns=[None] * 600)
    with delta.applied(lm):
        expected = samples.logits(lm.model)
    export = export_lora(delta, tmp_path, "tiny")
    assert export.rank in RANKS
    assert export.rank == 32  # of a 32 x 88 matrix no more is needed
    assert max(export.discarded.values()) < 1e-12
    assert torch.allclose(samples.logits(_in_peft(lm, tmp_path)), expected, atol=1e-4)


def test_refusals_leave_no_files(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm)
    with pytest.raises(InputError, match="from 8 to 512, not 4"):
        export_lora(delta, tmp_path / "a", "tiny", max_rank=4)
    with pytest.raises(InputError, match="empty"):
        export_lora(delta.without(samples.IDS), tmp_path / "a", "tiny")
    delta.factors[next(iter(delta.factors))].left[0, 0] = torch.nan
    with pytest.raises(NumericalError):
        export_lora(delta, tmp_path / "a", "tiny")
    assert not (tmp_path / "a").exists()


def test_targets_are_short_only_when_they_are_exact() -> None:
    names = [f"model.layers.{i}.{rest}" for i in range(3) for rest in ("mlp.down_proj", "self_attn.o_proj")]
    edited = ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert describe_targets(edited, names)["target_modules"] == ["down_proj"]
    assert describe_targets(edited, [])["target_modules"] == edited
    tower = [*names, "vision.layers.0.mlp.down_proj"]
    assert describe_targets(edited, tower) == {
        "target_modules": edited,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    experts = [*names, "model.layers.0.experts.1.down_proj"]
    assert describe_targets(edited, experts)["target_modules"] == ["mlp.down_proj"]
    mixed = [*edited, "model.layers.1.self_attn.o_proj"]
    assert describe_targets(mixed, names)["target_modules"] == sorted(mixed)
    assert describe_targets(["lm_head"], ["lm_head"])["target_modules"] == ["lm_head"]
