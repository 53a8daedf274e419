"""Bases whose weights are 4-bit or 8-bit (bitsandbytes): keys, values and statistics on them, the change as a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import delta_samples as samples
import edits
import pytest
import runs
import saved
import tiny
import torch

from editunlearn import editors, footprint
from editunlearn.deltas import files
from editunlearn.deltas.lora import export_lora
from editunlearn.editors.contexts import prompt_of
from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm.fingerprint import model_fingerprint
from editunlearn.lm.generation import generate
from editunlearn.lm.loading import LM, load
from editunlearn.lm.weights import quantisation, root_mean_square, shape

KINDS = ("nf4", "int8")
TAUGHT = [(prompt, answer) for prompt, _, answer in edits.TAUGHT]
REFUSED = ("The capital of Atlantis is", "The mother tongue of Nobody is", "Some cats sing in the")
TRAIN = ("value.steps=20", "refine.steps=120", "refine.lr=0.2", "refine.kl=1", "refine.text_kl=0.3")


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editunlearn.lm.loading.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"'nf4' needs bitsandbytes: pip install 'editunlearn\[quant\]'"):
        load("demo", dtype="nf4")


def test_what_a_rounded_model_takes() -> None:
    from editunlearn import estimate
    from editunlearn.hparams import load_hparams

    target = estimate.target(tiny.config("llama"), load_hparams("memit"))
    whole, four, eight = (footprint.weights(target, 4, how) for how in ("", "nf4", "int8"))
    maps = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 88)
    assert whole - eight == 3 * maps and whole - four == maps * (4 - 0.5625)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes")
    made = tmp_path_factory.mktemp("base") / "model"
    return saved.model(tiny.taught_lm([*TAUGHT, *((p, edits.REFUSAL) for p in REFUSED)], hidden=64), made)


def base(folder: Path, kind: str) -> LM:
    return load(folder, dtype=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_base_is_read_and_stays(kind: str, folder: Path) -> None:
    lm = base(folder, kind)
    name = lm.layout.site(0).name
    assert quantisation(lm.model, name) == {"nf4": "4-bit (nf4)", "int8": "8-bit (int8)"}[kind]
    assert shape(lm.model, name) == (64, 184)
    plain = load(folder)
    assert root_mean_square(lm.model, name) == pytest.approx(root_mean_square(plain.model, name), rel=0.1)
    before = model_fingerprint(lm)
    samples.logits(lm.model)
    assert model_fingerprint(lm) == before == model_fingerprint(base(folder, kind))


def answers(lm: LM) -> list[str]:
    facts = [edits.fact(number) for number in range(len(TAUGHT))]
    return [a.strip() for a in generate(lm, [prompt_of(lm, f) for f in facts], max_new_tokens=12)]


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_forgets_and_leaves_a_lora(method: str, kind: str, folder: Path, text: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = base(folder, kind)
    request = edits.request((0, 1, 2), (3, 4, 5))
    right, weights = [answer for _, answer in TAUGHT], model_fingerprint(lm)
    hp = edits.settings(method, text, *TRAIN, "context_prefixes.count=1", "moments.weight=1")
    assert answers(lm) == right
    delta, _ = editors.run(lm, request, hp)
    assert model_fingerprint(lm) == weights
    plain = samples.logits(lm.model)
    with delta.applied(lm):
        assert answers(lm) == [edits.REFUSAL] * 3 + right[3:]
        wanted = samples.logits(lm.model)
    assert not torch.allclose(wanted, plain, atol=0.1) and torch.equal(samples.logits(lm.model), plain)
    files.save(delta, tmp_path / "delta")
    files.check_base(files.load(tmp_path / "delta"), base(folder, kind))  # the same weights when loaded again
    with pytest.raises(UnsupportedError, match="merging would round the edit away"):
        lm.layout.read_weight(lm.model, lm.layout.site(0).name)
    export_lora(delta, tmp_path / "lora", lm.name)
    adapted: Any = peft.PeftModel.from_pretrained(lm.model, tmp_path / "lora").eval()
    torch.testing.assert_close(samples.logits(adapted), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["memit", "npo", "grace", "wise"])
def test_commands(method: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    world = runs.build(tmp_path / "world")
    out = tmp_path / "run"
    settings = {
        "memit": [f"moments.text={world.root / 'text.txt'}", *runs.QUICK],
        "npo": ["train.what=lora", "train.epochs=2"],
        "grace": ["value.steps=3", "layers=[1]"],
        "wise": ["side.steps=3", "layers=[1]"],
    }[method]
    flags = ["--hparams", method, "--model", str(world.model), "--cache-dir", str(world.cache), "--dtype", kind]
    flags += ["--facts", str(world.root / "facts.jsonl"), "--retain", str(world.root / "retain.jsonl")]
    flags += [word for item in [*settings, "limits.perplexity=null"] for word in ("--set", item)]
    refused = runs.call("apply", *flags, "--out", str(out), "--save", "merged")
    assert refused.code == 2 and (f"with --dtype {kind} the weights are rounded" in refused.err or method != "memit")
    save = ["--save", "lora"] if method in ("memit", "npo") else []
    done = runs.call("apply", *flags, "--out", str(out), *save)
    assert done.code == 0, done.err
    assert json.loads((out / "results.json").read_text())
    again = ["evaluate", "--delta", str(out), "--suite", "facts", "--dtype", kind, "--cache-dir", str(world.cache)]
    again += ["--facts", str(world.root / "facts.jsonl"), "--limit", "2", "--out", str(tmp_path / "measured")]
    measured = runs.call(*again)
    assert measured.code == 0, measured.err
