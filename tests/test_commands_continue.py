"""``apply --continue``: one delta of all facts, resumable, and refused where it would not be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edits import MEMORY, Killed
from runs import FACTS, Called, World, build, call, listing, write_lines
from test_commands_memory import flags as memory_flags

from editunlearn.deltas.files import load as load_delta
from editunlearn.editors.flow import Flow

OUT = ("delta.json", "delta.safetensors", "past_keys.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = build(tmp_path_factory.mktemp("continue") / "world")
    for fact in FACTS:
        write_lines(world.root / f"{fact['id']}.jsonl", [fact])
    return world


def facts(world: World, name: str) -> list[str]:
    return ["--facts", str(world.root / f"{name}.jsonl")]


@pytest.fixture(scope="module")
def first(world: World) -> Path:
    out = world.root / "first"
    called = call("apply", *world.flags(out, *facts(world, "darrieux"), "--evaluate", "none"))
    assert called.code == 0, called.err
    return out


@pytest.fixture(scope="module")
def second(world: World, first: Path) -> tuple[Path, Called]:
    """All facts are given: the earlier one is only measured."""
    out = world.root / "second"
    return out, call("apply", *world.flags(out, "--continue", str(first)))


def test_one_delta_holds_all_facts(world: World, first: Path, second: tuple[Path, Called], tmp_path: Path) -> None:
    out, called = second
    assert called.code == 0, called.err
    manifest = json.loads((out / "delta.json").read_text())
    assert [part["count"] for part in manifest["facts"]] == [1, 1] and manifest["method"] == "memit"
    assert manifest["facts"][0] == json.loads((first / "delta.json").read_text())["facts"][0]
    results = json.loads((out / "results.json").read_text())
    assert results["facts"] == 2 and results["metrics"]["forget_leak"]["base"] == 1.0
    assert "earlier facts" not in results["not_measured"]
    for gone, left in ((FACTS[0], FACTS[1]), (FACTS[1], FACTS[0])):
        less = tmp_path / str(left["id"])
        called = call("export", "--delta", str(out), "--without", str(gone["id"]), "--to", "delta", "--out", str(less))
        assert called.code == 0, called.err
        assert listing(less) == {*OUT, "README.md"} and load_delta(less).manifest.fact_count == 1
        again = call("apply", *world.flags(tmp_path / "again", *facts(world, str(left["id"])), "--continue", str(less)))
        assert again.code == 2 and "already holds all 1 facts" in again.err
        back = world.flags(tmp_path / f"back-{gone['id']}", *facts(world, str(gone["id"])), "--continue", str(less))
        called = call("apply", *back, "--evaluate", "none")
        assert called.code == 0, called.err


def test_facts_that_are_stored_as_hashes_are_not_measured(world: World, first: Path, tmp_path: Path) -> None:
    called = call("apply", *world.flags(tmp_path / "run", *facts(world, "france"), "--continue", str(first)))
    assert called.code == 0, called.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["not_measured"]["earlier facts"].startswith("1 facts of earlier runs are stored as hashes only")
    assert "not measured: 1 facts of earlier runs" in called.err


def test_interrupted_it_goes_on_to_the_same_bytes(
    world: World, first: Path, second: tuple[Path, Called], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_args: Any) -> None:
        raise Killed

    run = world.flags(tmp_path / "run", "--continue", str(first), "--evaluate", "none")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Flow, "solve", killed)
        call("apply", *run)
    assert not (tmp_path / "run" / "delta.json").exists() and (tmp_path / "run" / ".work").is_dir()
    called = call("apply", *run)
    assert called.code == 0 and "values: 1 from the interrupted run" in called.err, called.err
    for name in OUT:
        assert (tmp_path / "run" / name).read_bytes() == (second[0] / name).read_bytes(), name
    assert call("apply", *run).code == 0  # the finished run of the same request
    called = call("apply", *run, "--targets", "empty")
    assert called.code == 2 and "another request (other facts or targets)" in called.err


def test_what_is_no_earlier_run_is_refused_before_any_work(
    world: World, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_load(*_args: Any, **_more: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("editunlearn.lm.loading.load", no_load)
    other = build(tmp_path / "other")
    clash = write_lines(tmp_path / "clash.jsonl", [{**FACTS[1], "id": "darrieux"}])
    before = (first / "delta.json").read_bytes()
    for more, what in (
        (["--continue", str(tmp_path)], "no delta.json, so not a finished run"),
        (["--continue", str(first), "--model", str(other.model)], "was made on another model; give --model"),
        (["--continue", str(first), "--dtype", "bf16"], "was made in float32; leave --dtype out"),
        (["--continue", str(first), "--set", "layers=[1]"], "Set the layers of the earlier run"),
        (["--continue", str(first), "--past", str(first / OUT[2])], "leave --past out"),
        (["--continue", str(first), "--out", str(first)], "is the run to go on from, which is kept"),
        (["--continue", str(first), *facts(world, "darrieux")], "already holds all 1 facts"),
        (["--continue", str(first), "--facts", str(clash)], "'darrieux' is already that of another fact"),
    ):
        called = call("apply", *world.flags(tmp_path / "run", *more))
        assert called.code == 2 and what in called.err, (more, called.err)
        assert not (tmp_path / "run").exists()
    called = call("apply", *memory_flags(world, "grace", tmp_path / "run", "--continue", str(first)))
    assert called.code == 2 and "a memory and a change of weights cannot be one delta" in called.err
    assert (first / "delta.json").read_bytes() == before


def test_another_method_at_the_same_layers(world: World, first: Path, tmp_path: Path) -> None:
    flags = world.flags(tmp_path / "run", "--continue", str(first), "--evaluate", "none", "--store-facts")
    flags[1] = "alphaedit"
    called = call("apply", *flags)
    assert called.code == 0 and "going on from" in called.err and "1 of those given among them" in called.err
    manifest = json.loads((tmp_path / "run" / "delta.json").read_text())
    assert manifest["method"] == "memit+alphaedit"
    assert [part["method"] for part in manifest["hparams"]["parts"]] == ["memit", "alphaedit"]
    assert [part["text"][0]["id"] for part in manifest["facts"]] == ["darrieux", "france"]
    assert call("apply", *flags).code == 0
    assert f"--continue {first.name}" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("method", MEMORY)
def test_memories(world: World, method: str, tmp_path: Path) -> None:
    called = call("apply", *memory_flags(world, method, tmp_path / "a", *facts(world, "france"), "--evaluate", "none"))
    assert called.code == 0, called.err
    called = call("apply", *memory_flags(world, method, tmp_path / "b", "--continue", str(tmp_path / "a")))
    assert called.code == 0, called.err
    both = load_delta(tmp_path / "b")
    assert both.manifest.fact_count == 2 and both.without(["france"]).manifest.fact_count == 1


def test_limits(world: World, tmp_path: Path) -> None:
    called = call("apply", *world.flags(tmp_path / "run", "--set", "limits.norm=1e-6", "--evaluate", "none"))
    assert called.code == 1 and "above limits.norm (1e-06)" in called.err
    assert not (tmp_path / "run" / "delta.json").exists()
