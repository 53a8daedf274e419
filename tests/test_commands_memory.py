"""The commands with methods that keep a memory beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edits import MEMORY
from runs import FACTS, Called, World, build, call, listing

RUN_FILES = {"README.md", "delta.json", "delta.safetensors", "results.json", "timing.json"}
FEW = {
    "grace": ["layers=[1]", "context_prefixes.count=1", "value.steps=3", "keep=20"],
    "wise": [
        "layers=[1]",
        "context_prefixes.count=1",
        "side.steps=5",
        "shards.size=1",
        "shards.per_memory=1",
        "keep=20",
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("memory") / "world")


def flags(world: World, method: str, out: Path | None, *more: str) -> list[str]:
    """Of a quick run."""
    found = ["--hparams", method, "--model", str(world.model), "--cache-dir", str(world.cache)]
    found += ["--facts", str(world.root / "facts.jsonl"), "--retain", str(world.root / "retain.jsonl")]
    found += [word for item in FEW[method] for word in ("--set", item)]
    return [*found, *(["--out", str(out)] if out is not None else []), *more]


@pytest.fixture(scope="module", params=MEMORY)
def finished(request: pytest.FixtureRequest, world: World) -> tuple[str, Path, Called]:
    out = world.root / f"run-{request.param}"
    return request.param, out, call("apply", *flags(world, request.param, out))


def test_apply(finished: tuple[str, Path, Called]) -> None:
    method, out, called = finished
    assert called.code == 0, called.err
    assert listing(out) == RUN_FILES
    assert "facts to forget" in called.out and "summary" in called.out and "layers: 1" in called.err
    assert called.err.splitlines()[-1].startswith("next: editunlearn evaluate --delta")
    results = json.loads((out / "results.json").read_text())
    assert results["method"] == method and results["metrics"]["forget_leak"]["edited"] is not None
    card = (out / "README.md").read_text()
    for words in (
        "What it costs to use",
        "no weights changed",
        "still in the weights",
        f"editunlearn apply --hparams {method}",
    ):
        assert words in card
    assert "Darrieux" not in card and "Realised gain" not in card
    manifest = json.loads((out / "delta.json").read_text())
    (site,) = manifest["sites"].values()
    assert manifest["kind"] == "memory" and site["nbytes"] == _numbers(out) * 4


def _numbers(out: Path) -> int:
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(out / "delta.safetensors").values())


def test_evaluate_a_delta(world: World, finished: tuple[str, Path, Called], tmp_path: Path) -> None:
    where = ["--delta", str(finished[1]), "--cache-dir", str(world.cache), "--facts", str(world.root / "facts.jsonl")]
    called = call(
        "evaluate", *where, "--suite", "facts", "--out", str(tmp_path), "--limit", "2", "--under", "relearn:1"
    )
    assert called.code == 0, called.err
    assert "leak_gen" in called.out
    called = call("evaluate", *where, "--suite", "facts", "--out", str(tmp_path), "--under", "int4")
    assert called.code == 2 and "--under int4" in called.err and "leaves the weights as they are" in called.err


def test_export(world: World, finished: tuple[str, Path, Called], tmp_path: Path) -> None:
    delta = ["--delta", str(finished[1])]
    for to in ("merged", "lora"):
        called = call("export", *delta, "--to", to, "--out", str(tmp_path / to))
        assert called.code == 2 and f"--to {to}" in called.err and "leaves the weights as they are" in called.err
    called = call("export", *delta, "--revert", "--to", "delta", "--out", str(tmp_path / "revert"))
    assert called.code == 2 and "--revert" in called.err
    both = [str(fact["id"]) for fact in FACTS]
    called = call("export", *delta, "--without", *both, "--to", "delta", "--out", str(tmp_path / "none"), "--json")
    assert called.code == 0, called.err
    assert json.loads(called.out) == {"facts": 0, "sites": 0, "entries": 0}
    for number, left_out in enumerate(both):
        one = ["--without", left_out, "--to", "delta", "--out", str(tmp_path / f"one-{number}")]
        assert call("export", *delta, *one).code == 0
    parts = ["--delta", str(tmp_path / "one-0"), "--compose", str(tmp_path / "one-1")]
    called = call("export", *parts, "--to", "delta", "--out", str(tmp_path / "two"))
    assert called.code == 0 and "delta with 2 facts" in called.out, called.err
    called = call("export", *delta, *parts[2:], "--to", "delta", "--out", str(tmp_path / "three"))
    assert called.code == 2 and "they would be written twice" in called.err


@pytest.mark.parametrize("method", MEMORY)
def test_what_has_no_meaning_is_refused_before_any_work(world: World, method: str, tmp_path: Path) -> None:
    for kind in ("lora", "merged", "lora,merged"):
        called = call("apply", *flags(world, method, tmp_path / "run", "--save", kind))
        assert called.code == 2 and f"--save {kind}: {method} keeps a memory" in called.err
    called = call("stats", "--hparams", method, "--model", str(world.model), "--cache-dir", str(world.cache))
    assert called.code == 2 and "needs no second moments" in called.err


@pytest.mark.parametrize("method", MEMORY)
def test_dry_run_and_the_same_bytes_again(world: World, method: str, tmp_path: Path) -> None:
    called = call("apply", *flags(world, method, None, "--dry-run"))
    assert called.code == 0, called.err
    assert "model.layers.1.mlp.down_proj" in called.out and "work: training, at most" in called.out
    for name in ("a", "b"):
        called = call("apply", *flags(world, method, tmp_path / name, "--evaluate", "none", "--quiet"))
        assert called.code == 0, called.err
    for file in ("delta.safetensors", "delta.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    called = call("apply", *flags(world, method, tmp_path / "a", "--evaluate", "none", "--targets", "empty"))
    assert called.code == 2 and "another request (other facts or targets)" in called.err
