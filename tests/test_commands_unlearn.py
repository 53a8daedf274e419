"""The commands with unlearners: the same flags, files and tables as for editors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import Called, World, build, call, listing

RUN_FILES = {"README.md", "delta.json", "delta.safetensors", "results.json", "timing.json"}
QUICK = {
    "npo": ["train.epochs=12", "train.lr=0.01", "train.batch=1", "limits.perplexity=null"],
    "idk": ["train.what=lora", "train.rank=4", "train.epochs=30", "train.lr=0.03", "limits.perplexity=null"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("unlearn") / "world")


def flags(world: World, method: str, out: Path | None, *more: str) -> list[str]:
    """Of a quick run."""
    found = ["--hparams", method, "--model", str(world.model), "--cache-dir", str(world.cache)]
    found += ["--facts", str(world.root / "facts.jsonl"), "--retain", str(world.root / "retain.jsonl")]
    found += [word for item in QUICK[method] for word in ("--set", item)]
    return [*found, *(["--out", str(out)] if out is not None else []), *more]


@pytest.fixture(scope="module", params=QUICK)
def finished(request: pytest.FixtureRequest, world: World) -> tuple[str, Path, Called]:
    out = world.root / f"run-{request.param}"
    return request.param, out, call("apply", *flags(world, request.param, out, "--save", "lora,merged"))


def test_apply(finished: tuple[str, Path, Called]) -> None:
    method, out, called = finished
    assert called.code == 0, called.err
    assert {name.split("/")[0] for name in listing(out)} == RUN_FILES | {"lora", "merged"}
    assert "facts to forget" in called.out and "summary" in called.out and "matrices (auto" in called.err
    results = json.loads((out / "results.json").read_text())
    row = results["metrics"]["forget_probability"]
    assert results["method"] == method and row["edited"] < 0.5 * row["base"]
    card = (out / "README.md").read_text()
    assert f"editunlearn apply --hparams {method}" in card and "matrices changed" in card and "Darrieux" not in card
    kind = json.loads((out / "delta.json").read_text())["kind"]
    assert kind == ("low_rank" if method == "idk" else "dense")


def test_export_and_evaluate(world: World, finished: tuple[str, Path, Called], tmp_path: Path) -> None:
    method, out, _ = finished
    delta = ["--delta", str(out)]
    called = call("export", *delta, "--to", "merged", "--base", str(world.model), "--out", str(tmp_path / "merged"))
    assert called.code == 0, called.err
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", out / "merged"))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    called = call("export", *delta, "--without", "darrieux", "--to", "delta", "--out", str(tmp_path / "none"))
    assert called.code == 2 and ("learned together" in called.err or "no columns of its own" in called.err)
    called = call("export", *delta, "--revert", "--to", "delta", "--out", str(tmp_path / "revert"))
    assert called.code == 0 and json.loads((tmp_path / "revert" / "delta.json").read_text())["negated"]
    where = [*delta, "--cache-dir", str(world.cache), "--facts", str(world.root / "facts.jsonl")]
    called = call(
        "evaluate", *where, "--suite", "facts", "--out", str(tmp_path / "e"), "--limit", "2", "--under", "int8"
    )
    assert called.code == 0 and "leak_gen" in called.out, called.err


@pytest.mark.parametrize("method", QUICK)
def test_dry_run_and_the_same_bytes_again(world: World, method: str, tmp_path: Path) -> None:
    called = call("apply", *flags(world, method, None, "--dry-run"))
    assert called.code == 0, called.err
    assert "mlp.down_proj" in called.out and "self_attn.q_proj" in called.out
    assert "work: training, at most" in called.out and "what is trained, with the optimiser" in called.out
    planned = json.loads(call("apply", *flags(world, method, None, "--dry-run", "--json")).out)
    for name in ("a", "b"):
        called = call("apply", *flags(world, method, tmp_path / name, "--evaluate", "none", "--quiet"))
        assert called.code == 0, called.err
    for file in ("delta.safetensors", "delta.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    sites = json.loads((tmp_path / "a" / "delta.json").read_text())["sites"]
    assert set(planned["sites"]) == set(sites)
    written = (tmp_path / "a" / "delta.safetensors").stat().st_size
    assert planned["disk_bytes"] <= written < planned["disk_bytes"] + 10_000
    called = call("apply", *flags(world, method, tmp_path / "a", "--evaluate", "none", "--targets", "empty"))
    assert called.code == 2 and "another request (other facts or targets)" in called.err


def test_what_has_no_meaning_is_refused_before_any_work(
    world: World, finished: tuple[str, Path, Called], tmp_path: Path
) -> None:
    _, out, _ = finished
    called = call("apply", *flags(world, "npo", tmp_path / "x", "--continue", str(out)))
    assert called.code == 2 and (
        "cannot go on from a delta" in called.err or "learned all facts together" in called.err
    )
    called = call("stats", "--hparams", "npo", "--model", str(world.model), "--cache-dir", str(world.cache))
    assert called.code == 2 and "needs no second moments" in called.err
    wrong = ["--set", "train.what=modules", "--set", "train.modules=[mlp.dwn]"]
    called = call("apply", *flags(world, "npo", tmp_path / "x", *wrong))
    assert called.code == 2 and "'mlp.dwn'" in called.err and "loading" not in called.err
    wrong = ["--set", "retain.data=text", "--set", "retain.text=none.txt"]
    called = call("apply", *flags(world, "npo", tmp_path / "x", *wrong))
    assert called.code == 2 and "none.txt" in called.err


def test_a_diverging_run_says_where_its_last_good_state_is(world: World, tmp_path: Path) -> None:
    more = ["--set", "limits.norm=0.1", "--set", "train.epochs=50", "--set", "train.lr=0.03", "--evaluate", "none"]
    called = call("apply", *flags(world, "npo", tmp_path / "run", *more))
    assert called.code == 1 and "diverged" in called.err and "last_good" in called.err
    (where,) = (tmp_path / "run").glob(".work/*/last_good")
    assert not (tmp_path / "run" / "delta.json").exists()
    where_flags = ["--delta", str(where), "--cache-dir", str(world.cache), "--facts", str(world.root / "facts.jsonl")]
    called = call("evaluate", *where_flags, "--suite", "facts", "--out", str(tmp_path / "e"), "--limit", "2")
    assert called.code == 0, called.err
