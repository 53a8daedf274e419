"""Merging into a loaded model and into a checkpoint on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import delta_samples as samples
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from editunlearn.deltas import merge as merging
from editunlearn.deltas import shards
from editunlearn.deltas.merge import JOURNAL, merge, merge_folder
from editunlearn.errors import InputError, NumericalError, StaleError, UnsupportedError


class Killed(BaseException):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", samples.TYPES)
def test_applied_and_merged_are_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    lm = tiny.lm(kind, dtype=dtype)
    delta = samples.delta(lm)
    with delta.applied(lm):
        expected = samples.logits(lm.model)
        weights = samples.snapshot(lm.model)
    pointers = {name: parameter.data_ptr() for name, parameter in lm.model.named_parameters()}
    report = merge(lm, delta)
    samples.assert_same(lm.model, weights)
    assert torch.equal(samples.logits(lm.model), expected)
    assert {name: parameter.data_ptr() for name, parameter in lm.model.named_parameters()} == pointers
    assert report.keys() == delta.factors.keys()
    assert all(found.gain == pytest.approx(1.0, abs=0.02) for found in report.values())


def test_a_merge_is_reverted_by_the_negative() -> None:
    lm = tiny.lm("gpt2")
    delta, before = samples.delta(lm), samples.snapshot(lm.model)
    merge(lm, delta)
    with pytest.raises(StaleError):
        merge(lm, delta)  # twice
    merge(lm, delta.negated())
    for name, tensor in lm.model.state_dict().items():
        assert torch.allclose(tensor, before[name], atol=1e-6)


def test_a_merge_that_is_refused_changes_nothing() -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm)
    other = tiny.lm("llama", seed=1)
    before = samples.snapshot(other.model)
    with pytest.raises(StaleError):
        merge(other, delta)
    samples.assert_same(other.model, before)
    half = tiny.lm("llama", dtype=torch.float16)
    before = samples.snapshot(half.model)
    delta.factors["model.layers.2.mlp.down_proj"].left.mul_(1e8)
    with pytest.raises(NumericalError, match=r"layers\.2"):
        merge(half, delta, force=True)
    samples.assert_same(half.model, before)
    delta.factors["model.layers.2.mlp.down_proj"].left[0, 0] = torch.nan
    with pytest.raises(NumericalError):
        merge(lm, delta)


def test_quantised_and_tied_weights_are_refused() -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm)
    target = lm.layout.module(lm.model, "model.layers.0.mlp.down_proj")
    twin = lm.layout.module(lm.model, "model.layers.1.mlp.down_proj")
    own, twin.weight = twin.weight, target.weight
    with pytest.raises(UnsupportedError, match=r"layers\.0.* tied to model\.layers\.1\.mlp\.down_proj"):
        merge(lm, delta)
    twin.weight = own
    target.__class__ = type("Linear4bit", (nn.Linear,), {})
    with pytest.raises(UnsupportedError, match=r"4-bit .*merging would round the edit away\. Use --save lora"):
        merge(lm, delta)


def _checkpoint(lm: Any, folder: Path, shard: str = "5GB") -> Path:
    lm.model.save_pretrained(folder, max_shard_size=shard)
    lm.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("the base model's card")
    (folder / "pytorch_model.bin").write_bytes(b"another copy of the weights")
    return folder


def _loaded(folder: Path) -> torch.Tensor:
    return samples.logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval())


@pytest.mark.parametrize("shard", ["5GB", "30KB"])
@pytest.mark.parametrize("kind", samples.TYPES)
def test_a_merged_folder_is_the_merged_model(kind: str, shard: str, tmp_path: Path) -> None:
    lm = tiny.lm(kind)
    base = _checkpoint(lm, tmp_path / "base", shard)
    delta = samples.delta(lm)
    report = merge_folder(base, delta, tmp_path / "out")
    in_memory = merge(lm, delta)
    assert torch.equal(_loaded(tmp_path / "out"), samples.logits(lm.model))
    assert {name: found.gain for name, found in report.items()} == {n: f.gain for n, f in in_memory.items()}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in base.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert (shards.INDEX in written) == (shard == "30KB")


@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_dtypes_order_metadata_and_other_tensors_stay(shard: str, tmp_path: Path) -> None:
    lm = tiny.lm("gpt2", dtype=torch.bfloat16)
    base, out = _checkpoint(lm, tmp_path / "base", shard), tmp_path / "out"
    delta = samples.delta(lm)
    merge_folder(base, delta, out)
    edited = {f"{name}.weight" for name in delta.factors}
    for path in base.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        with safe_open(path, "pt") as a, safe_open(out / path.name, "pt") as b:
            assert a.metadata() == b.metadata()
            assert list(a.keys()) == list(b.keys())
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.read_bytes()[: 8 + length] == (out / path.name).read_bytes()[: 8 + length]
        for key, tensor in before.items():
            assert after[key].dtype == torch.bfloat16
            assert torch.equal(after[key], tensor) == (key not in edited)


def _renamed(base: Path, rename: Any, **extra: torch.Tensor) -> Path:
    path = base / shards.SINGLE
    tensors = {rename(key): value for key, value in load_file(path).items()}
    save_file({**tensors, **extra}, path, metadata={"format": "pt"})
    return base


def test_keys_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    lm = tiny.lm("gpt2")
    base = _renamed(_checkpoint(lm, tmp_path / "base"), lambda key: key.removeprefix("transformer."))
    assert "h.0.mlp.c_proj.weight" in load_file(base / shards.SINGLE)
    delta = samples.delta(lm)
    merge_folder(base, delta, tmp_path / "out")
    merge(lm, delta)
    merged = load_file(tmp_path / "out" / shards.SINGLE)
    assert torch.equal(merged["h.2.mlp.c_proj.weight"], lm.model.transformer.h[2].mlp.c_proj.weight)


def test_keys_with_another_prefix_are_found_and_ambiguous_ones_refused(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    base = _renamed(_checkpoint(lm, tmp_path / "base"), lambda key: f"language_model.{key}")
    delta = samples.delta(lm)
    merge_folder(base, delta, tmp_path / "out")
    twice = {"vision.layers.0.mlp.down_proj.weight": torch.ones(2, 2)}
    _renamed(base, lambda key: key, **twice)
    merge_folder(base, delta, tmp_path / "again")  # the longer ending decides
    _renamed(base, lambda key: key.replace("language_model.model", "text"), **twice)
    with pytest.raises(InputError, match=r"several tensors .*text\.layers\.0.*vision\.layers\.0"):
        merge_folder(base, delta, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_bad_checkpoints_and_folders_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    base = _checkpoint(lm, tmp_path / "base")
    delta, out = samples.delta(lm), tmp_path / "out"
    with pytest.raises(InputError, match="not done in place"):
        merge_folder(base, delta, tmp_path / "x" / ".." / "base")
    with pytest.raises(InputError, match="not a folder"):
        merge_folder(tmp_path / "nowhere", delta, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedError, match="only safetensors"):
        merge_folder(tmp_path / "empty", delta, out)
    with pytest.raises(StaleError, match=r"layers\.0[\s\S]*layers\.2"):
        merge_folder(base, samples.delta(tiny.lm("llama", seed=1)), out)
    with pytest.raises(InputError, match=r"\(32, 88\), the delta is for \(48, 136\)"):
        merge_folder(base, samples.delta(tiny.lm("llama", hidden=48)), out)
    with pytest.raises(InputError, match="no tensor for transformer"):
        merge_folder(base, samples.delta(tiny.lm("gpt2")), out)
    delta.factors["model.layers.2.mlp.down_proj"].left.fill_(1e38).mul_(10)
    with pytest.raises(NumericalError):
        merge_folder(base, delta, out)
    assert not out.exists()
    _checkpoint(tiny.lm("llama", seed=1), out)
    before = (out / shards.SINGLE).read_bytes()
    with pytest.raises(InputError, match="already holds weights"):
        merge_folder(base, samples.delta(lm), out)
    assert (out / shards.SINGLE).read_bytes() == before
    (base / shards.SINGLE).write_bytes((base / shards.SINGLE).read_bytes()[:-100])
    with pytest.raises(InputError, match="cut off"):
        merge_folder(base, samples.delta(lm), tmp_path / "new")


@pytest.mark.parametrize(
    ("config", "rename", "dtype", "words"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, lambda k: k, torch.uint8, r"is 4-bit \(nf4\)"),
        (
            {"quant_method": "gptq", "bits": 4},
            lambda k: k.replace(".weight", ".qweight"),
            torch.int32,
            r"4-bit \(gptq\)",
        ),
        ({"quant_method": "fp8"}, lambda k: k, torch.float8_e4m3fn, r"quantised \(fp8\)"),
        (None, lambda k: k, torch.int8, "is I8"),
    ],
)
def test_quantised_tensors_are_refused(
    config: Any, rename: Any, dtype: torch.dtype, words: str, tmp_path: Path
) -> None:
    lm = tiny.lm("llama")
    base = _checkpoint(lm, tmp_path / "base")
    path = base / shards.SINGLE
    tensors = {
        rename(key) if "down_proj" in key else key: value.to(dtype) if "down_proj" in key else value
        for key, value in load_file(path).items()
    }
    save_file(tensors, path)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    with pytest.raises(UnsupportedError, match=words + r".*; merging would round the edit away\. Use --save lora"):
        merge_folder(base, samples.delta(lm), tmp_path / "out")


def _killed_before_the_card(base: Path, delta: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Any, destination: Any) -> None:
        if str(destination).endswith("README.md"):
            raise Killed
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            merge_folder(base, delta, out, card="# Edited\n")


def test_a_killed_merge_goes_on_and_keeps_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")
    base, out = _checkpoint(lm, tmp_path / "base", "30KB"), tmp_path / "out"
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) >= 4
    delta = samples.delta(lm)
    real, done = os.replace, []

    def replace(source: Any, destination: Any) -> None:
        if str(destination).endswith(".safetensors"):
            if len(done) == 3:
                raise Killed
            done.append(Path(destination).name)
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            merge_folder(base, delta, out)
    assert sorted(path.name for path in out.glob("*.safetensors")) == files[:3]
    assert not (out / shards.INDEX).exists()  # what is there does not pass for a model
    marks = {name: (out / name).stat().st_ino for name in files[:3]}
    with (out / files[1]).open("r+b") as file:  # one finished shard is damaged meanwhile
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    _killed_before_the_card(base, delta, out, monkeypatch)
    assert (out / JOURNAL).exists()
    merge_folder(base, delta, out, card="# Edited\n")
    assert (out / "README.md").read_text() == "# Edited\n"
    assert {name: (out / name).stat().st_ino == marks[name] for name in files[:3]} == {
        files[0]: True,
        files[1]: False,
        files[2]: True,
    }
    assert not (out / JOURNAL).exists()
    straight = tmp_path / "straight"
    merge_folder(base, delta, straight, card="# Edited\n")
    for path in straight.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in straight.iterdir()}


def test_the_rest_of_another_merge_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")
    base, out = _checkpoint(lm, tmp_path / "base", "30KB"), tmp_path / "out"

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(merging, "atomic_write_bytes", kill)  # at the index: all shards are there
        with pytest.raises(Killed):
            merge_folder(base, samples.delta(lm, seed=1), out)
    delta = samples.delta(lm, seed=2)
    merge_folder(base, delta, out)
    merge(lm, delta)
    assert torch.equal(_loaded(out), samples.logits(lm.model))


def test_only_edited_tensors_pass_through_memory_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("gpt_neox")
    base = _checkpoint(lm, tmp_path / "base", "30KB")
    read: list[str] = []
    alive: list[int] = [0, 0]  # bytes now, most at once
    real = shards.safe_open

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = real(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file = self.inner.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.inner.__exit__(*args)

        def get_tensor(self, key: str) -> torch.Tensor:
            import weakref

            tensor = self.file.get_tensor(key).clone()
            read.append(key)
            alive[0] += tensor.nbytes
            alive[1] = max(alive)
            weakref.finalize(tensor, lambda size=tensor.nbytes: alive.__setitem__(0, alive[0] - size))
            return tensor

    monkeypatch.setattr(shards, "safe_open", Counting)
    delta = samples.delta(lm)
    merge_folder(base, delta, tmp_path / "out")
    assert set(read) == {f"{name}.weight" for name in delta.factors}
    largest = max(f.shape[0] * f.shape[1] * 4 for f in delta.factors.values())
    assert alive[1] <= 2 * largest  # the one in hand, and the one before it until its name is bound again


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": []}'])
def test_a_damaged_index_is_told(tmp_path: Path, index: str) -> None:
    lm = tiny.lm("llama")
    base = _checkpoint(lm, tmp_path / "base", "30KB")
    (base / shards.INDEX).write_text(index)
    with pytest.raises(InputError, match="not an index of safetensors files"):
        merge_folder(base, samples.delta(lm), tmp_path / "out")


@pytest.mark.parametrize("header", [b"[]", b'{"a": {"dtype": "F32", "shape": [1]}}', b'{"a": 3}'])
def test_a_damaged_header_is_told(tmp_path: Path, header: bytes) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / shards.SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        shards.read_checkpoint(base)


def test_a_damaged_journal_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")
    base, out = _checkpoint(lm, tmp_path / "base", "30KB"), tmp_path / "out"
    _killed_before_the_card(base, samples.delta(lm), out, monkeypatch)
    (out / JOURNAL).write_text("{")
    merge_folder(base, samples.delta(lm), out)
    assert not (out / JOURNAL).exists() and (out / shards.INDEX).exists()
