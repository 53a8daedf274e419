"""Bad input ends with exit code 2 and one report, nothing written and no weights read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FACTS, World, build, call, listing, spawn, write_lines
from safetensors.torch import save_file
from transformers import AutoConfig

from editunlearn.errors import InputError
from editunlearn.pipeline import forget

PAST = "editunlearn.past_keys"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("bad") / "world")


@pytest.fixture()
def refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls ``apply`` and makes sure that it refuses politely; returns the lines of its report."""

    def check(*flags: str, out: Path | None = None, command: str = "apply") -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr("editunlearn.lm.loading.load", _no_load)
            patch.chdir(tmp_path)
            before = listing(tmp_path) | listing(world.root)
            base = world.flags(out or tmp_path / "out") if command == "apply" else world.stats_flags(tmp_path / "cache")
            called = call(command, *base, *flags)
            assert listing(tmp_path) | listing(world.root) == before
        assert called.code == 2, called.err
        assert called.out == "" and "Traceback" not in called.err
        return [line.removeprefix("error: ") for line in called.err.splitlines() if line.startswith("error: ")]

    return check


def _no_load(*_args: Any, **_more: Any) -> None:
    raise AssertionError("weights were loaded")


def _config(folder: Path, world: World, model_type: str = "llama", **changes: Any) -> str:
    """A model folder whose configuration says something else; its weights are never read."""
    shutil.copytree(world.model, folder)
    path = folder / "config.json"
    if model_type != "llama":
        AutoConfig.for_model(model_type).save_pretrained(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


def _facts(path: Path, *rows: dict[str, Any]) -> str:
    return str(write_lines(path, list(rows)))


def test_facts(refused: Any, tmp_path: Path) -> None:
    def says(source: str, *texts: str) -> None:
        lines = refused("--facts", source)
        for text in texts:
            assert any(text in line for line in lines), (text, lines)

    says(str(tmp_path / "no.jsonl"), "no.jsonl: no such file")
    (tmp_path / "garbled.jsonl").write_text('{"prompt": "a\n{"answer')
    says(str(tmp_path / "garbled.jsonl"), "garbled.jsonl:1", "garbled.jsonl:2")
    (tmp_path / "empty.jsonl").write_text("")
    says(str(tmp_path / "empty.jsonl"), "empty.jsonl")
    other = {**FACTS[0], "subject": "Marie Curie"}
    says(_facts(tmp_path / "subject.jsonl", other), 'subject "Marie Curie" is not in the prompt')
    twice = {**FACTS[1], "id": "darrieux"}
    says(_facts(tmp_path / "ids.jsonl", FACTS[0], twice), 'ids.jsonl:2: id "darrieux" is already that of')
    against = {**FACTS[0], "id": "x", "answer": "Russian"}
    says(_facts(tmp_path / "answers.jsonl", FACTS[0], against), 'answer "Russian" contradicts "French"')
    assert "limit has to be at least 1, not 0" in refused("--limit", "0")[0]
    two = [{**FACTS[0], "target": "Oslo"}, {**FACTS[0], "id": "y", "target": "Paris"}]
    says(_facts(tmp_path / "targets.jsonl", *two), 'target "Paris" contradicts "Oslo"')
    assert "File name too long. Check the path." in refused("--facts", "[" + "x" * 5000)[0]


def test_flags(refused: Any) -> None:
    assert "unknown targets 'refuse'. Did you mean 'refusal'?" in refused("--targets", "refuse")[0]
    lines = refused("--targets", "counterfactual")
    assert len(lines) == 2 and lines[0].startswith("darrieux: no target")
    assert "--save: 'gguf' is not known. Choose from delta, lora, merged." in refused("--save", "lora,gguf")
    assert "unrecognized arguments: --sede" in refused("--sede", "1")[0]
    assert "dtype 'int4' is not one of" in refused("--dtype", "int4")[0]
    assert "device_map 'gpu'" in refused("--device-map", "gpu")[0]
    assert "device 'meta': not here. There are: cpu" in refused("--device-map", "meta")[0]
    assert "nowhere.safetensors: cannot be read as past keys" in refused("--past", "nowhere.safetensors")[0]
    assert "not allowed with argument" in refused("--resume", "--fresh")[0]


def test_settings(refused: Any, tmp_path: Path) -> None:
    lines = refused("--set", "value.step=3", "--set", "value.lr=fast", "--set", "layers=[7]")
    assert any("unknown key 'value.step'. Did you mean 'value.steps'?" in line for line in lines)
    assert any("value.lr is" in line and "a number above 0" in line for line in lines)
    assert "block 7 does not exist; there are blocks 0 to 2" in refused("--set", "layers=[7]")[0]
    assert "hparams 'nemit' is neither a file nor a shipped" in refused("--hparams", "nemit")[0]
    assert "is not a file" in refused("--set", "moments.text=nowhere.txt")[0]
    lines = refused("--set", "moments.length=100000", "--set", "refine.text_length=5000")
    assert lines == [
        "moments.length is 100000; this model takes 256 tokens at most.",
        "refine.text_length is 5000; this model takes 256 tokens at most.",
    ]
    assert "seed is a number of" in refused("--set", f"seed=-0x{'f' * 6000}")[0]
    assert "block 9 does not exist" in refused("--layers", "9", command="stats")[0]
    assert "nothing to measure" in refused("--set", "moments.text=none", command="stats")[0]
    (tmp_path / "file").write_text("")
    assert "--cache-dir" in refused("--cache-dir", str(tmp_path / "file"), command="stats")[0]
    assert "--cache-dir" in refused("--cache-dir", str(tmp_path / "file"))[0]


def test_models(refused: Any, world: World, tmp_path: Path) -> None:
    assert "no such file or folder" in refused("--model", str(tmp_path / "no"))[0]
    mamba = _config(tmp_path / "mamba", world, "mamba2")
    assert "model type 'mamba2' has no MLP output projection to edit. Known:" in refused("--model", mamba)[0]
    t5 = _config(tmp_path / "t5", world, "t5")
    assert "model type 't5' is an encoder-decoder" in refused("--model", t5)[0]
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packed = _config(tmp_path / "packed", world, quantization_config=four)
    (line,) = refused("--model", packed, "--save", "merged")
    assert line.startswith("--save merged: the checkpoint is quantised (bitsandbytes)") and "--save lora" in line
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "config.json").write_text('{"model_type": "alien"}')
    (tmp_path / "alien" / "model.safetensors").write_bytes(b"")
    assert "alien" in refused("--model", str(tmp_path / "alien"))[0]


def test_out(refused: Any, world: World, tmp_path: Path) -> None:
    (tmp_path / "way").write_text("a file")
    assert "is a file, not a folder" in refused(out=tmp_path / "way" / "run")[0]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("my own notes")
    (line,) = refused(out=mine)
    assert "its README.md would be replaced, and no run made them" in line
    (mine / "delta.json").write_text("{}")
    assert "format is None" in refused(out=mine)[0]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that not even root can write to")
def test_out_that_only_looks_writable(refused: Any) -> None:
    assert "--out /proc/run: /proc is not writable" in refused(out=Path("/proc/run"))[0]


def test_past_keys_of_another_model(refused: Any, tmp_path: Path) -> None:
    keys = {"model.layers.0.mlp.down_proj": torch.zeros(2, 7), "transformer.h.0.mlp.c_proj": torch.zeros(2, 136)}
    for name, tensor in keys.items():
        save_file({name: tensor}, tmp_path / "past.safetensors", {"format": PAST})
        (line,) = refused("--past", str(tmp_path / "past.safetensors"))
        assert name in line and "Give the past keys of a run on this model" in line
    for bad in (torch.zeros(7), torch.full((2, 7), torch.nan)):
        save_file({"model.layers.0.mlp.down_proj": bad}, tmp_path / "past.safetensors", {"format": PAST})
        assert "is no table of finite keys" in refused("--past", str(tmp_path / "past.safetensors"))[0]


def test_everything_at_once_in_one_report(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "way").write_text("a file")
    bad = _facts(tmp_path / "bad.jsonl", {**FACTS[0], "subject": "X"}, {"prompt": "no answer"})
    lines = refused(
        *("--model", str(tmp_path / "no"), "--facts", bad, "--retain", str(tmp_path / "no.jsonl"), "--set", "x=1"),
        *("--save", "gguf", "--dtype", "int4", "--cache-dir", str(tmp_path / "way"), "--targets", "nothing"),
        *("--past", "no.safetensors"),
        out=tmp_path / "way",
    )
    parts = ["no: no such", "bad.jsonl:1", "bad.jsonl:2", "no.jsonl", "unknown key 'x'", "gguf", "int4", "--cache-dir"]
    for part in [*parts, "'nothing'", "no.safetensors", "--out"]:
        assert sum(part in line for line in lines) >= 1, (part, lines)
    assert len(lines) == len(set(lines)) >= 11


def test_unknown_commands_and_missing_flags() -> None:
    called = call("aply")
    assert called.code == 2 and "unknown command 'aply'. Did you mean 'apply'?" in called.err
    for command in ("apply", "stats", "export"):
        called = call(command)
        assert called.code == 2 and "required" in called.err and f"See editunlearn {command} --help" in called.err


def test_a_whole_process_ends_the_same_way(world: World, tmp_path: Path) -> None:
    called = spawn("editunlearn.apply", *world.flags("out", "--targets", "nothing"), cwd=tmp_path)
    assert called.code == 2 and called.out == "" and not listing(tmp_path)
    assert called.err.splitlines()[-1].startswith("error: unknown targets 'nothing'")


def test_api_refuses_limit_and_empty_facts(world: World) -> None:
    from editunlearn.hparams import load_hparams
    from editunlearn.lm.loading import load

    with pytest.raises(InputError, match="no facts to forget"):
        forget(load(world.model), [], load_hparams("memit"), cache=world.cache, evaluate=False)
