"""Loading from folders, tokens, config and size, fingerprints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import saved
import tiny
import torch
from transformers import AutoConfig

from editunlearn.errors import InputError
from editunlearn.lm import loading
from editunlearn.lm.loading import load

pytestmark = pytest.mark.usefixtures("offline")


# --- folders


@pytest.mark.parametrize("model_type", tiny.TYPES)
def test_save_and_load(model_type: str, tmp_path: Path) -> None:
    made = tiny.lm(model_type)
    found = load(saved.model(made, tmp_path / "m"), device_map="cpu")
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
    found = load(saved.model(tiny.lm("llama", dtype=stored), tmp_path), dtype=given, device_map="cpu")
    assert found.dtype == expected
    assert found.dtype_reason == ("the checkpoint's own" if given == "auto" else "given")


def test_default_device_has_a_reason(tmp_path: Path) -> None:
    found = load(saved.model(tiny.lm("llama"), tmp_path))
    assert found.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.device_reason in ("no GPU was found", "a GPU was found")


def test_another_tokenizer(tmp_path: Path) -> None:
    folder = saved.model(tiny.lm("llama"), tmp_path / "m")
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


# --- config and size


def test_peek_config_and_estimate(tmp_path: Path) -> None:
    lm = tiny.lm("gpt2")
    config = loading.peek_config(saved.model(lm, tmp_path))
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
