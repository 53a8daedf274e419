"""A model with its memories as a folder that opens with transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from edits import MEMORY, TAUGHT, fact, request, settings

from editunlearn import editors
from editunlearn.deltas.memory import MemoryDelta
from editunlearn.deltas.side import SideMemory
from editunlearn.deltas.standalone import bundle, check, cost, export_standalone
from editunlearn.editors.contexts import prompt_of
from editunlearn.errors import StaleError, UnsupportedError
from editunlearn.lm.generation import generate

STRANGER = """
import copy, json, sys
sys.modules["editunlearn"] = None  # as where it is not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    pass
else:
    sys.exit("it opened without its memories")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokenizer.padding_side = "left"


def answers(model):
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = dict(max_new_tokens=8, do_sample=False)
    together = model.generate(**inputs, **options)[:, inputs.input_ids.shape[1]:]
    alone = []
    for prompt in prompts:
        one = tokenizer(prompt, return_tensors="pt")
        alone.append(model.generate(**one, **options)[0, one.input_ids.shape[1]:])
    without = model.generate(**inputs, use_cache=False, max_new_tokens=1, do_sample=False)[:, -1]
    assert torch.equal(without, together[:, 0])
    text = tokenizer.batch_decode(together, skip_special_tokens=True)
    assert text == tokenizer.batch_decode(alone, skip_special_tokens=True)
    return text


model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
found = answers(model)
assert answers(copy.deepcopy(model)) == found
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
assert half.dtype == torch.bfloat16
assert all(part.dtype == torch.float32 for part in half.memories.buffers())
half.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=2)
model.save_pretrained(sys.argv[3])
assert answers(AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)) == found
print(json.dumps(found))
"""


def stranger(folder: Path, prompts: list[str], tmp_path: Path) -> Any:
    """What the model of a folder answers in a process that has no editunlearn."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules")}
    environment.pop("PYTHONPATH", None)
    call = [sys.executable, "-c", STRANGER, str(folder), json.dumps(prompts), str(tmp_path / "again")]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def louder(memory: Any) -> Any:
    """A memory that is woken by the same prompts, and then changes what is said, however little it was trained."""
    if isinstance(memory, SideMemory):
        return replace(memory, updates=30 * memory.updates, thresholds=30 * memory.thresholds)
    return replace(memory, values=-memory.values)


def made(method: str, kind: str) -> tuple[Any, MemoryDelta]:
    lm = tiny.taught_lm([(prompt, answer) for prompt, _, answer in TAUGHT], kind)
    return lm, check(editors.fit(lm, request((0, 1, 2), (3, 4, 5)), settings(method, "")))


CASES = [("grace", kind) for kind in ("llama", "gpt2", "qwen2_moe")]
CASES += [("wise", kind) for kind in ("qwen2", "gemma3_text")]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_opens_without_this_package_and_says_the_same(method: str, kind: str, tmp_path: Path) -> None:
    lm, fitted = made(method, kind)
    delta = MemoryDelta({name: louder(memory) for name, memory in fitted.memories.items()}, fitted.manifest)
    export_standalone(lm, delta, tmp_path / "model")
    prompts = [prompt_of(lm, fact(number)) for number in range(6)]
    with delta.applied(lm):
        expected = generate(lm, prompts, max_new_tokens=8)
    assert expected != generate(lm, prompts, max_new_tokens=8)
    assert stranger(tmp_path / "model", [prompt.text for prompt in prompts], tmp_path) == expected


def test_its_code_is_the_packages_own_and_needs_nothing_else() -> None:
    sources = bundle("editunlearn.deltas.remembering")
    assert "deltas_remembering" in sources and "numerics_side" in sources
    for name, text in sources.items():
        compile(text, name, "exec")
        assert "from editunlearn" not in text and "import editunlearn" not in text
        for word in text.split():
            if word.startswith(".") and word[1:].replace("_", "").isalpha():
                assert word[1:] in sources


def test_the_card_says_what_it_costs(tmp_path: Path) -> None:
    lm, delta = made("wise", "llama")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    found = cost(lm, delta)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    size = found["weights and memories, MB"]
    assert size["with the memory"] - size["base"] == pytest.approx(delta.nbytes / 1e6)  # type: ignore[operator]
    assert all(value is not None and value > 0 for row in found.values() for value in row.values())  # type: ignore[operator]
    export_standalone(lm, delta, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    for words in ("each token behind it, ms", "with it, awake", "trust_remote_code=True", "still in the weights"):
        assert words in card
    assert "Japan" not in card


def test_awake_is_awake() -> None:
    for method in MEMORY:
        lm, delta = made(method, "llama")
        awake = MemoryDelta({name: memory.awake() for name, memory in delta.memories.items()}, delta.manifest)
        ids = torch.tensor([[0, 9, 31, 7]])
        with torch.no_grad():
            base = lm.model(ids).logits
            with awake.applied(lm):
                assert not torch.equal(lm.model(ids).logits, base)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    lm, delta = made("grace", "llama")
    with pytest.raises(StaleError):
        export_standalone(tiny.lm("llama", hidden=48, seed=5), delta, tmp_path / "model")
    lm.model.config.quantization_config = {"bits": 4}
    with pytest.raises(UnsupportedError, match="quantised"):
        export_standalone(lm, delta, tmp_path / "model")
    assert not (tmp_path / "model").exists()
