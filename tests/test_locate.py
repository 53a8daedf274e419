"""The command ``locate``, from flags to files, and what it keeps for ``layers: located``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from edits import Killed

from editunlearn.editors import located
from editunlearn.tracing import effects
from editunlearn.tracing.prompts import LAST, ROLES

FAST = ["--samples", "2", "--batch-tokens", "200"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[runs.World]:
    yield runs.build(tmp_path_factory.mktemp("locate") / "world")


def locate(world: runs.World, out: Path, *more: str) -> runs.Called:
    flags = ["--model", str(world.model), "--cache-dir", str(out.parent / "cache"), "--out", str(out)]
    return runs.call("locate", *flags, "--facts", str(world.root / "facts.jsonl"), *FAST, *more)


def test_files_tables_and_located_layers(world: runs.World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = locate(world, out, "--severed")
    assert done.code == 0, done.err
    assert "effect at the last subject token, measured" in done.out and "the model answers only 2 of 2" in done.err
    found = json.loads((out / "locate.json").read_text())
    assert found["model"]["blocks"] == 3 and [one["id"] for one in found["facts"]] == ["darrieux", "france"]
    for kind in ("block", "mlp", "attention"):
        about = found["kinds"][kind]
        assert set(about["measured"]) <= set(ROLES) and len(about["measured"][LAST]) == 3
        mean, low, high, facts = about["measured"][LAST][1]
        assert low <= mean <= high and facts == 2
        assert -1 <= about["agreement"]["per_fact"][0] <= 1
    assert set(found["severed_at_last_subject_token"]) == {"mlp", "attention"}
    # the last block's whole output at the last token is all that the head sees
    end = found["kinds"]["block"]["measured"]["last token"][2][0]
    assert end == pytest.approx(found["probability"]["total_effect"][0], rel=1e-4)
    assert (out / "locate.png").read_bytes()[:4] == b"\x89PNG"
    assert "restored" in (out / "locate.svg").read_text()

    text = str(world.root / "text.txt")
    settings = ["method=memit"]
    flags = ["--hparams", "memit", "--model", str(world.model), "--facts", str(world.root / "facts.jsonl")]
    flags += ["--retain", str(world.root / "retain.jsonl"), "--cache-dir", str(tmp_path / "cache")]
    settings = [f"moments.text={text}", "layers=located", *runs.QUICK[1:]]
    flags += [part for item in settings for part in ("--set", item)]
    applied = runs.call("apply", *flags, "--out", str(tmp_path / "edit"), "--evaluate", "none")
    assert applied.code == 0, applied.err
    assert "located: the MLPs of largest effect at the last subject token, over 2 facts" in applied.err
    wanted = located.strongest([cell[0] for cell in found["kinds"]["mlp"]["measured"][LAST]], 1)
    manifest = json.loads((tmp_path / "edit" / "delta.json").read_text())
    assert manifest["hparams"]["layers"] == wanted

    for strongest in (2, 0):  # by depth it is the first block, and that is not changed by what was traced
        effects = [float(block == strongest) for block in range(3)]
        (kept,) = (tmp_path / "cache" / "located").iterdir()
        kept.write_text(json.dumps({"facts": 2, "effects": effects}))
        by_depth = [flag if flag != "layers=located" else "layers=auto" for flag in flags]
        applied = runs.call("apply", *by_depth, "--out", str(tmp_path / f"auto{strongest}"), "--evaluate", "none")
        assert applied.code == 0, applied.err
        assert ("tracing 2 facts spoke for [2] (--set layers=located)" in applied.err) == (strongest == 2)

    elsewhere = [*flags[: flags.index("--cache-dir") + 1], str(tmp_path / "other"), *flags[flags.index("--set") :]]
    refused = runs.call("apply", *elsewhere, "--out", str(tmp_path / "edit2"))
    assert refused.code == 2 and "has not been traced. Run: editunlearn locate --model" in refused.err


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    world: runs.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate(world, tmp_path / "whole").code == 0
    traced: list[str] = []
    plain = effects.trace

    def killed(tracer: Any, prompt: Any, *rest: Any, **named: Any) -> Any:
        if len(traced) == 1:
            raise Killed
        traced.append(prompt.id)
        return plain(tracer, prompt, *rest, **named)

    monkeypatch.setattr(effects, "trace", killed)
    with pytest.raises(Killed):
        locate(world, tmp_path / "cut")
    assert not (tmp_path / "cut" / "locate.json").exists()
    traced.clear()
    assert locate(world, tmp_path / "cut").code == 0  # the second fact is the only one left
    whole, cut = (json.loads((tmp_path / name / "locate.json").read_text()) for name in ("whole", "cut"))
    assert {k: v for k, v in whole.items() if k != "command"} == {k: v for k, v in cut.items() if k != "command"}
    assert (tmp_path / "whole" / "locate.svg").read_bytes() == (tmp_path / "cut" / "locate.svg").read_bytes()


def test_fast_estimates_and_restores_nothing(world: runs.World, tmp_path: Path) -> None:
    done = locate(world, tmp_path / "out", "--fast", "--no-figure", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert "measured" not in found["kinds"]["mlp"] and len(found["kinds"]["mlp"]["estimated"][LAST]) == 3
    assert not (tmp_path / "out" / "locate.svg").exists() and not (tmp_path / "cache" / "located").exists()


def test_sweep_edits_with_each_block(world: runs.World, tmp_path: Path) -> None:
    flags = ["--sweep", "--set", f"moments.text={world.root / 'text.txt'}"]
    flags += [part for item in runs.QUICK[1:4] for part in ("--set", item)]
    done = locate(world, tmp_path / "out", *flags, "--set", "limits.norm=50", "--layers", "0", "2")
    assert done.code == 0, done.err
    assert "edited with one block alone" in done.out
    sweep = json.loads((tmp_path / "out" / "locate.json").read_text())["sweep"]
    assert [one["layer"] for one in sweep["layers"]] == [0, 2]
    assert sweep["base"]["scores"]["forget_leak"] == 1.0 and sweep["hparams"]["refine"] is None
    assert all((one["scores"] is None) == bool(one["reason"]) for one in sweep["layers"])
    assert any(one["scores"] and one["scores"] != sweep["base"]["scores"] for one in sweep["layers"])


def test_bad_input_is_found_before_weights(world: runs.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from editunlearn import locate as command

    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights were loaded"))
    done = locate(world, tmp_path / "o", "--count", "0", "--noise", "0", "--window", "9", "--fast", "--severed")
    assert done.code == 2
    assert "--count 0: at least 1" in done.err and "--noise 0: a number above 0" in done.err
    assert "--window 9: from 1 to the number of blocks, 3" in done.err and "--fast --severed" in done.err
    assert "--layers: says which blocks --sweep edits with" in locate(world, tmp_path / "o", "--layers", "1").err
    assert "grace changes no weights" in locate(world, tmp_path / "o", "--sweep", "--hparams", "grace").err
    assert not (tmp_path / "o").exists()


def test_dry_run_reads_no_weights(world: runs.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from editunlearn import locate as command

    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights were loaded"))
    done = locate(world, tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0 and json.loads(done.out)["states"] > 0
    assert not (tmp_path / "out").exists()
