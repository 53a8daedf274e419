"""Statistics, edits and evaluations by two processes are those of one, launched by torchrun's variables or Slurm's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file

from editunlearn.lm.processes import Processes, launched


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> runs.World:
    made = runs.build(tmp_path_factory.mktemp("processes") / "world")
    lines = [f"{i}. {line}" for i in range(40) for line in (runs.TEXT.split("\n\n")[0], "Birds sing in the morning.")]
    (made.root / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return made


def moments(cache: Path) -> list[torch.Tensor]:
    found = sorted((cache / "moments").rglob("moment.safetensors"))
    return [load_file(path)["moment"] for path in found]


@pytest.mark.parametrize("launcher", [runs.TORCHRUN, runs.SLURM])
def test_two_processes_give_the_moments_of_one(
    launcher: list[dict[str, str]], world: runs.World, tmp_path: Path
) -> None:
    flags = [*world.stats_flags(tmp_path / "one"), "--set", "moments.length=32", "--json"]
    assert runs.call("stats", *flags).code == 0
    flags[flags.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    first, second = runs.launch(launcher, tmp_path, "editunlearn.stats", *flags)
    assert first.code == second.code == 0, first.err + second.err
    assert len(json.loads(first.out)) == 1 and second.out == ""  # one of them speaks
    (alone,), (together,) = moments(tmp_path / "one"), moments(tmp_path / "two")
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert not list((tmp_path / "two").rglob("partial.safetensors"))


def test_more_processes_than_batches(world: runs.World, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(runs.TEXT.split("\n\n")[0], encoding="utf-8")
    flags = world.stats_flags(tmp_path / "cache", "--set", f"moments.text={short}", "--set", "moments.length=32")
    assert [one.code for one in runs.launch(runs.TORCHRUN, tmp_path, "editunlearn.stats", *flags)] == [0, 0]
    assert len(moments(tmp_path / "cache")) == 1


def test_what_the_launcher_says() -> None:
    assert launched({}) == Processes() == launched({"WORLD_SIZE": "1", "RANK": "0"})
    assert launched(runs.TORCHRUN[1]) == Processes(1, 2, 1) == launched(runs.SLURM[1])
    # a shell inside of an allocation is no step of four
    assert launched({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Processes()
    shares = [list(Processes(rank, 3).share(range(7))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def factors(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "delta.safetensors")
    return {
        name.removesuffix(".left"): left @ tensors[name.removesuffix("left") + "right"]
        for name, left in tensors.items()
        if name.endswith(".left")
    }


def near(one: object, other: object) -> None:
    """Two JSON values, numbers up to rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            near(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            near(mine, theirs)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    else:
        assert one == other


@pytest.mark.parametrize(("method", "more"), [("memit", []), ("alphaedit", ["--offload"])])
def test_two_processes_make_the_edit_of_one(method: str, more: list[str], world: runs.World, tmp_path: Path) -> None:
    # one fact in a batch, so that each process has some
    flags = [*world.flags(None), "--set", "batch_tokens=1", "--hparams", method, "--store-facts"]
    alone = runs.call("apply", *flags, "--out", str(tmp_path / "one"))
    assert alone.code == 0, alone.err
    flags[flags.index("--cache-dir") + 1] = str(tmp_path / "cache")
    flags += ["--out", str(tmp_path / "two"), *more]
    first, second = runs.launch(runs.TORCHRUN, tmp_path, "editunlearn.apply", *flags)
    assert first.code == second.code == 0, first.err + second.err
    assert second.out == second.err == "" and "to forget" in first.out
    assert runs.listing(tmp_path / "one") == runs.listing(tmp_path / "two")
    mine, theirs = factors(tmp_path / "one"), factors(tmp_path / "two")
    assert mine.keys() == theirs.keys()
    for name, change in mine.items():
        assert (theirs[name] - change).norm() <= 1e-3 * change.norm()
    near(*(json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two")))


def test_two_processes_measure_what_one_does(world: runs.World, tmp_path: Path) -> None:
    edit = tmp_path / "edit"
    assert runs.call("apply", *world.flags(edit, "--evaluate", "none")).code == 0
    flags = [
        "--delta",
        str(edit),
        "--base",
        "--suite",
        "facts:attacks",
        "--cache-dir",
        str(world.cache),
        "--limit",
        "3",
    ]
    flags += ["--facts", str(world.root / "facts.jsonl"), "--retain", str(world.root / "retain.jsonl"), "--json"]
    alone = runs.call("evaluate", *flags, "--out", str(tmp_path / "one"))
    assert alone.code == 0, alone.err
    first, second = runs.launch(runs.TORCHRUN, tmp_path, "editunlearn.evaluate", *flags, "--out", str(tmp_path / "two"))
    assert first.code == second.code == 0, first.err + second.err
    assert second.out == second.err == ""
    near(json.loads(alone.out), json.loads(first.out))
    for place in sorted((tmp_path / "one").rglob("results.json")):
        other = tmp_path / "two" / place.relative_to(tmp_path / "one")
        near(*(json.loads(path.read_text())["parts"] for path in (place, other)))


def test_what_goes_wrong_in_one_ends_all(world: runs.World, tmp_path: Path) -> None:
    code = "from editunlearn.lm.processes import joined\nwith joined() as here:\n    "
    (tmp_path / "fails.py").write_text(code + "here.each(lambda: 1 // (1 - here.rank))\n", encoding="utf-8")
    both = runs.launch(runs.TORCHRUN, tmp_path, "fails")
    assert [one.code for one in both] == [1, 1]
    assert all("ZeroDivisionError" in one.err for one in both)  # the first one is told, and does not wait
    trained = ["--hparams", "npo", "--model", str(world.model), "--facts", str(world.root / "facts.jsonl")]
    both = runs.launch(runs.TORCHRUN, tmp_path, "editunlearn.apply", *trained, "--out", str(tmp_path / "y"))
    assert [one.code for one in both] == [2, 2] and "Start one process" in both[0].err


def test_shares_come_together_in_order() -> None:
    assert Processes().together(list(range(5)), lambda share: [2 * i for i in share]) == [0, 2, 4, 6, 8]
    assert Processes().by_first(lambda: 3) == 3 and Processes().each(lambda: 4) == [4]
