"""Trouble that input checks cannot foresee (memory, disk, damaged files, interruptions): exit code 1 or 130."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FACTS, Called, World, argv, build, call, environment, listing, write_lines
from safetensors.torch import load_file, save_file

from editunlearn.deltas.files import load as load_delta


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("trouble") / "world")


def _edit(world: World, out: Path, *more: str) -> Called:
    return call("apply", *world.flags(out, "--evaluate", "none", *more))


def test_out_of_memory_halves_the_batch(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from editunlearn.editors.values import Together

    assert _edit(world, tmp_path / "whole").code == 0
    real, sizes = Together.solve, []

    def scarce(self: Any, names: Any) -> Any:
        sizes.append(len(names))
        if len(names) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(self, names)

    monkeypatch.setattr(Together, "solve", scarce)
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

    out, other = tmp_path / "out", str(write_lines(tmp_path / "other.jsonl", [FACTS[1]]))
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
