"""Bad input ends with exit code 2, one report, nothing written and no weights read; trouble later with 1 or 130."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FACTS, Called, World, argv, build, call, environment, listing, spawn, write_lines
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from editunlearn.deltas.files import load as load_delta
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


# --- trouble that input checks cannot foresee


def _edit(world: World, out: Path, *more: str) -> Called:
    return call("apply", *world.flags(out, "--evaluate", "none", *more))


def test_out_of_memory_halves_the_batch(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from editunlearn.editors.values import _Together

    assert _edit(world, tmp_path / "whole").code == 0
    real, sizes = _Together.solve, []

    def scarce(self: Any, names: Any) -> Any:
        sizes.append(len(names))
        if len(names) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(self, names)

    monkeypatch.setattr(_Together, "solve", scarce)
    called = _edit(world, tmp_path / "halves")
    assert called.code == 0 and sizes == [2, 1, 1]
    assert "warning: out of memory with 2 at once; going on with 1" in called.err
    whole, halves = (load_delta(tmp_path / name) for name in ("whole", "halves"))
    for name, factors in whole.factors.items():
        again = halves.factors[name]
        torch.testing.assert_close(again.left @ again.right, factors.left @ factors.right, atol=1e-4, rtol=1e-3)


def test_out_of_memory_for_good(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def none(*_args: Any, **_more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nA second line.")

    _edit(world, tmp_path / "first")  # fills the cache
    monkeypatch.setattr(LlamaForCausalLM, "forward", none)
    called = _edit(world, tmp_path / "out")
    assert called.code == 1 and not (tmp_path / "out").exists()
    assert "error: out of memory: CUDA out of memory. Tried to allocate 2 GiB. Try" in called.err
    assert "second line" not in called.err and "Traceback" not in called.err


@pytest.mark.parametrize("evaluate", ["facts", "none"])
def test_weights_that_are_not_finite(world: World, tmp_path: Path, evaluate: str) -> None:
    shutil.copytree(world.model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    before = listing(tmp_path)
    flags = world.flags(tmp_path / "out", "--evaluate", evaluate, "--cache-dir", str(tmp_path / "cache"))
    called = call("apply", *flags, "--model", str(tmp_path / "model"))
    assert called.code == 1 and "not finite" in called.err and "Traceback" not in called.err
    assert listing(tmp_path) == before


def test_an_edit_that_destroys_the_model_is_not_saved(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from editunlearn.evaluation import scoring

    seen = iter([12.0, float("inf")])
    monkeypatch.setattr(scoring, "perplexity", lambda *_: next(seen))
    called = call("apply", *world.flags(tmp_path / "out"))
    assert called.code == 1 and "perplexity after the edit is not finite; nothing was written" in called.err
    assert not [name for name in listing(tmp_path) if ".work" not in name]


@pytest.mark.parametrize("name", ["delta.safetensors", "results.json", "values.safetensors"])
def test_disk_full(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = os.replace

    def full(source: Any, target: Any, **more: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        called = _edit(world, tmp_path / "out")
    assert called.code == 1
    errors = [line for line in called.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "No space left on device" in errors[0] and name in errors[0]
    assert "Run the same command again to go on" in errors[0]
    assert name not in {Path(p).name for p in listing(tmp_path)} and not list(tmp_path.rglob("*.tmp-*"))
    called = _edit(world, tmp_path / "out")
    assert called.code == 0 and ("from the interrupted run" in called.err) == (name != "values.safetensors")
    assert not (tmp_path / "out" / ".work").exists()


def test_disk_full_as_safetensors_says_it(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_args: Any, **_more: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    called = _edit(world, tmp_path / "out")
    assert called.code == 1 and called.err.splitlines()[-1].startswith("error: No space left on device (os error 28).")


def test_other_errors_keep_their_traceback(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_more: Any) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr("editunlearn.lm.loading.load", broken)
    with pytest.raises(ZeroDivisionError):
        _edit(world, tmp_path / "out")


def test_interrupt(world: World, tmp_path: Path) -> None:
    flags = world.flags("out", "--evaluate", "none", settings=["moments.length=32", "value.steps=100000"])
    flags += ["--set", "value.stop_loss=0", "--set", "refine.steps=3", "--fresh"]
    child = subprocess.Popen(
        argv("editunlearn.apply", *flags),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in background jobs
    )
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        if line.startswith("layers:"):
            time.sleep(0.5)
            child.send_signal(signal.SIGINT)
    assert child.wait(600) == 130
    assert lines[-1].startswith("error: interrupted; finished work is kept. Run the same command again without --fresh")
    assert "Traceback" not in "".join(lines) and not (tmp_path / "out" / "delta.json").exists()


def test_a_forced_run_that_is_interrupted_leaves_nothing_mixed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from editunlearn import reporting

    out, other = tmp_path / "out", _facts(tmp_path / "other.jsonl", FACTS[1])
    assert _edit(world, out, "--save", "lora").code == 0

    def killed(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reporting, "results", killed)
        assert _edit(world, out, "--facts", other, "--force").code == 130
    assert not (out / "delta.json").exists()  # what has no manifest is not complete
    assert not (out / "lora").exists() and not (out / "results.json").exists()
    assert _edit(world, out, "--facts", other, "--force").code == 0
    assert _edit(world, tmp_path / "straight", "--facts", other).code == 0
    for name in ("delta.safetensors", "delta.json", "past_keys.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


@pytest.mark.parametrize("to", ["lora", "delta"])
def test_a_killed_export_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    assert _edit(world, tmp_path / "run").code == 0
    flags = ["--delta", str(tmp_path / "run"), "--to", to, "--out", str(tmp_path / "made")]

    def killed(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("editunlearn.deltas.lora.atomic_write_json", killed)
        patch.setattr("editunlearn.deltas.files.atomic_write_bytes", killed)
        assert call("export", *flags).code == 130
    assert not (tmp_path / "made").exists()
    assert call("export", *flags).code == 0
    assert list((tmp_path / "made").glob("*.safetensors"))


def test_export_checks_before_it_starts(world: World, tmp_path: Path) -> None:
    assert _edit(world, tmp_path / "run").code == 0
    flags = ["export", "--delta", str(tmp_path / "run"), "--out", str(tmp_path / "made"), "--dry-run"]
    for more, says in {
        ("--to", "merged", "--base", "/nonexistent"): "/nonexistent is not a folder",
        ("--to", "merged", "--model", "/nonexistent"): "/nonexistent",
        ("--to", "lora", "--max-rank", "3"): "rank limit of a LoRA must be from 8 to 512, not 3",
        ("--to", "lora", "--model", "x"): "--model is for --to merged",
        ("--to", "delta", "--dtype", "float16"): "--dtype is for --to merged",
        ("--to", "delta", "--max-rank", "8"): "--max-rank 8 is for --to lora",
        ("--to", "merged", "--base", str(world.model), "--dtype", "float16"): "--dtype: --base is merged on disk",
        ("--to", "merged", "--base", str(world.model), "--model", "x"): "--model: --base is merged on disk",
    }.items():
        called = call(*flags, *more)
        assert called.code == 2 and says in called.err, called.err


def test_damaged_caches_are_made_anew(world: World, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert _edit(world, tmp_path / "first", "--cache-dir", str(cache)).code == 0
    damaged = [*(cache / "known").glob("*.json"), *(cache / "prefixes").glob("*.json")]
    assert len(damaged) == 2
    for path, content in zip(damaged, ("[true", '{"not": "a list"}'), strict=True):
        path.write_text(content)
    assert _edit(world, tmp_path / "second", "--cache-dir", str(cache)).code == 0
    first, second = (tmp_path / name / "delta.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
