"""LoRA exports of what MEMIT and AlphaEdit really make: equal to the merged model in PEFT, and loadable by vLLM.

vLLM is not installed here. ``Vllm`` transcribes the rules that it refuses adapters by: ``MaxLoRARanks`` in
vllm/config/lora.py, ``PEFTHelper`` in vllm/lora/peft_helper.py, ``parse_fine_tuned_lora_name`` and
``get_supported_lora_modules`` in vllm/lora/utils.py, ``LoRAModel`` in vllm/lora/lora_model.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import delta_samples as samples
import edits
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from editunlearn import editors
from editunlearn.deltas.lora import RANKS, export_lora
from editunlearn.deltas.merge import merge

METHODS = ("memit", "alphaedit")
KINDS = ("llama", "qwen3", "gemma3_text", "gpt2", "qwen2_moe")
SERVED = tuple(kind for kind in KINDS if kind != "gpt2")  # vLLM has no LoRA for GPT-2


@dataclass(frozen=True)
class Vllm:
    """``vllm serve`` with ``--enable-lora --max-lora-rank N`` and a model."""

    model: Any
    max_lora_rank: int

    def load(self, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        """By module A, B and scale, or ValueError where vLLM would refuse."""
        if self.max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError("max_lora_rank")
        config = json.loads((folder / "adapter_config.json").read_text())
        for key in ("r", "lora_alpha", "target_modules"):
            if key not in config:
                raise ValueError(f"missing {key}")
        if config["r"] > self.max_lora_rank:
            raise ValueError("rank")
        if config.get("bias", "none") != "none" or config.get("modules_to_save") or config.get("use_dora"):
            raise ValueError("feature")
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        # of a linear map in this model the last part of its name; vLLM keeps the names of transformers
        maps = {n.rsplit(".", 1)[-1] for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            parts = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name)
            if parts is None:
                raise ValueError(f"{name} is unsupported LoRA weight")
            module, side = parts.groups()
            if ".experts" in module or module.rsplit(".", 1)[-1] not in maps:
                raise ValueError(f"unexpected module {module}")
            found.setdefault(module, {})[side] = tensor
        for module, sides in found.items():  # its buffers are (r, in) and (out, r)
            weight = self.model.get_submodule(module).weight
            assert sides["lora_A"].shape == (config["r"], weight.shape[1]), module
            assert sides["lora_B"].shape == (weight.shape[0], config["r"]), module
        return {module: (sides["lora_A"], sides["lora_B"], scale) for module, sides in found.items()}


def edited(method: str, kind: str, text: str) -> tuple[Any, Any]:
    lm = tiny.lm(kind)
    return lm, editors.fit(lm, edits.request(), edits.settings(method, text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_in_peft_is_the_merged_model(method: str, kind: str, text: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm, delta = edited(method, kind, text)
    assert export_lora(delta, tmp_path, "tiny").discarded == {}
    plain = samples.logits(lm.model)
    adapted = peft.PeftModel.from_pretrained(lm.model, tmp_path).eval()
    found = samples.logits(adapted)
    unloaded = tiny.lm(kind)
    merge(unloaded, delta)
    merged = samples.logits(unloaded.model)
    assert (merged - plain).norm() > 0.1  # the edit does something
    assert (found - merged).norm() <= 1e-4 * (merged - plain).norm()
    with adapted.disable_adapter():
        assert torch.equal(samples.logits(adapted), plain)
    in_peft = adapted.merge_and_unload()
    assert (samples.logits(in_peft) - merged).norm() <= 1e-4 * (merged - plain).norm()


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("method", METHODS)
def test_vllm_takes_the_adapter_and_computes_the_edit(method: str, kind: str, text: str, tmp_path: Path) -> None:
    lm, delta = edited(method, kind, text)
    made = export_lora(delta, tmp_path, "tiny", lm=lm)
    assert made.vllm_flags == f"--enable-lora --max-lora-rank {made.rank}"
    loaded = Vllm(lm.model, made.max_lora_rank).load(tmp_path)
    assert loaded.keys() == delta.factors.keys()
    for module, (a, b, scale) in loaded.items():
        assert scale == 1.0
        factors = delta.factors[module]
        torch.testing.assert_close(scale * b @ a, factors.left @ factors.right)
    smaller = [rank for rank in RANKS if rank < made.rank]
    for rank in smaller:  # no smaller setting would do, so that the flag is the one to give
        with pytest.raises(ValueError, match="rank"):
            Vllm(lm.model, rank).load(tmp_path)


def test_many_facts_keep_to_the_largest_rank(tmp_path: Path) -> None:
    lm = tiny.lm("llama", hidden=512)
    made = export_lora(samples.delta(lm, rank=700, columns=[None] * 700), tmp_path, "tiny", lm=lm)
    assert made.rank == 512 and made.discarded
    Vllm(lm.model, 512).load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "feature"),
        ({"bias": "all"}, "feature"),
        ({"modules_to_save": ["lm_head"]}, "feature"),
        ({"r": 1024}, "rank"),
    ],
)
def test_the_rules_refuse_what_vllm_refuses(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    export_lora(samples.delta(lm), tmp_path, "tiny")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        Vllm(lm.model, 512).load(tmp_path)


@pytest.mark.parametrize("name", ["base_model.model.lm_head.weight", "base_model.model.model.nothing.lora_A.weight"])
def test_the_rules_refuse_foreign_tensors(name: str, tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    export_lora(samples.delta(lm), tmp_path, "tiny")
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match="unsupported|unexpected"):
        Vllm(lm.model, 512).load(tmp_path)
