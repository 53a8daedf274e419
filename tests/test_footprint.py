"""Memory estimates: what autograd keeps is counted right, stages follow the settings, and a real run is near."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch

from editunlearn import estimate
from editunlearn.facts.readers import load_facts
from editunlearn.facts.records import Fact
from editunlearn.facts.targets import fill_targets
from editunlearn.footprint import Footprint, footprint
from editunlearn.hparams import load_hparams
from editunlearn.lm.kept import LENGTH, kept_by_autograd

FACTS: list[Fact] = fill_targets(load_facts(runs.ROOT / "data" / "demo_forget.jsonl"), "refusal:I don't know.", seed=0)


def kept(model: Any, first: int) -> int:
    """Bytes that a real pass keeps for its backward pass."""
    model.requires_grad_(False)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), tensor  # held, or another would get its place
        return tensor

    block = tiny.layout_of(model).module(model, tiny.layout_of(model).block_name(first))

    def wanted(_: Any, args: Any, kwargs: Any) -> None:
        (args[0] if args else next(iter(kwargs.values()))).requires_grad_(True)

    block.register_forward_pre_hook(wanted, with_kwargs=True)
    model.get_output_embeddings().forward = lambda hidden, *_, **__: hidden[:, :1, :1]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "bloom", "falcon", "qwen2_moe"])
@pytest.mark.parametrize("first", [0, 2])
def test_what_autograd_keeps(kind: str, first: int) -> None:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    real = kept(auto.from_config(tiny.config(kind)).eval(), first)
    assert LENGTH * kept_by_autograd(tiny.config(kind), "float32", first) == pytest.approx(real, rel=0.3)


def at(method: str, *settings: str, facts: list[Fact] = FACTS, layers: int = 3) -> Footprint:
    hp = load_hparams(method, set=list(settings))
    return footprint(estimate.target(tiny.config("llama", layers=layers), hp), hp, "float32", facts)


def test_stages_follow_the_settings() -> None:
    whole = at("memit")
    assert whole.peak == whole.program + whole.model + sum(whole.held.values()) + max(whole.stages.values())
    assert list(whole.rows("float32"))[-1] == "at the same time, about"
    assert "refining" not in at("memit", "refine=null").stages
    assert "second moments" not in at("memit", "moments.text=none").held
    few, many = (at("memit", f"batch_tokens={n}").stages["optimising values"] for n in (64, 2048))
    assert many > 2 * few
    deep, late = (at("memit", f"layers=[{n}]", layers=8).stages["refining"] for n in (0, 7))
    assert deep > 2 * late
    lora, full = (
        at("npo", f"train.what={what}").held["what is trained, with the optimiser"] for what in ("lora", "full")
    )
    assert full > 2 * lora
    assert set(at("memit", facts=[]).stages) == {"reading text"}


WATCHED = """
import atexit, re, runpy, sys
seen, module, *sys.argv[1:] = sys.argv[1:]
read = lambda: re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]
atexit.register(lambda: open(seen, "w").write(read()))
runpy.run_module(module, run_name="__main__")
"""
"""Runs a module and writes down the most memory that it had; the parent may be told its own."""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_real_run_takes_about_that(tmp_path: Path) -> None:
    world = runs.build(tmp_path / "world")
    flags = world.flags(tmp_path / "run", settings=["layers=[0]", "moments.length=32", "limits.norm=null"])
    planned = json.loads(runs.call("apply", *flags, "--dry-run", "--json").out)["memory_bytes"]
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "peak"), "editunlearn.apply", *map(str, flags)]
    subprocess.run(command, env=runs.environment(), check=True, capture_output=True)
    peak = 1024 * int((tmp_path / "peak").read_text())
    assert planned["at the same time, about"] == pytest.approx(peak, rel=0.25)
