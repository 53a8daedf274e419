"""``batch_tokens: auto``: what is free decides, results do not depend on it, and the record has the number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edits
import pytest
import runs
import tiny
import torch
from unlearning import settings as unlearner

from editunlearn import editors, methods
from editunlearn.console import Console
from editunlearn.hparams import as_settled, load_hparams, resolved
from editunlearn.lm import free, room
from editunlearn.lm.kept import HOLES, at_most, kept_by_autograd
from editunlearn.workspace import Workspace

CPU, QUIET = torch.device("cpu"), Console(quiet=True)


def refused(*_: Any) -> Any:
    raise AssertionError("nobody needs to know")


@pytest.mark.parametrize(
    ("tokens_there", "grows", "found"),
    [
        (3000, False, 2048),
        (1500, False, 1024),
        (300, False, 256),
        (1, False, 256),
        (5000, True, 4096),
        (9e9, True, 16384),
    ],
)
def test_tokens_are_a_power_of_two_that_fits(tokens_there: float, grows: bool, found: int) -> None:
    assert room.Room(tokens_there * 10 * HOLES, grows, 1e12, lambda first: 10.0 + first).tokens(2048, 0) == found


def test_nothing_is_counted_where_there_is_room_or_nobody_knows() -> None:
    assert room.Room(1e12, False, 1e3, refused).tokens(2048, 0) == 2048
    assert room.Room(1e12, True, 1e3, refused).tokens(2048, 0) == room.MOST
    assert room.Room(None, True, 1e3, refused).tokens(2048, 0) == 2048


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "bloom", "falcon", "qwen2_moe"])
def test_the_bound_is_one(kind: str) -> None:
    model = tiny.make(kind)
    kept = kept_by_autograd(tiny.config(kind), "float32", 0)
    assert kept < at_most(model, tiny.layout_of(model), 4)


def test_what_linux_says_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free, "MEMORY", tmp_path / "meminfo")
    assert free.free_memory(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:  5000 kB\n")
    monkeypatch.setattr(free, "GROUPS", tmp_path)
    monkeypatch.setattr(free, "OWN", tmp_path / "cgroup")
    assert free.free_memory(CPU) == 5000 * 1024
    (tmp_path / "cgroup").write_text("4:memory:/old\n0::/job/step\n")
    for name, limit in (("job", "3000000"), ("job/step", "max")):
        (tmp_path / name).mkdir()
        for file, text in (("max", limit), ("current", "2500000"), ("stat", "anon 1\ninactive_file 500000\n")):
            (tmp_path / name / f"memory.{file}").write_text(text)
    assert free.free_memory(CPU) == 1_000_000
    assert free.free_memory(torch.device("meta")) is None


@pytest.mark.parametrize("method", ["memit", "grace", "wise", "unke", "npo"])
def test_results_do_not_depend_on_it_and_the_record_has_the_number(
    method: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*more: str) -> Any:
        hp = unlearner(method, "train.epochs=2", *more) if method == "npo" else edits.settings(method, text, *more)
        return methods.fit(tiny.lm(), edits.request(), hp)

    plain, few = made(), made("batch_tokens=16")
    monkeypatch.setattr(room, "free_memory", lambda _: 1.0)  # the least that there is
    short = made()
    numbers = [delta.manifest.hparams["batch_tokens"] for delta in (plain, few, short)]
    assert numbers == [2048, 16, room.LEAST]
    for other in (few, short):
        for name, tensor in plain.tensors().items():
            torch.testing.assert_close(other.tensors()[name], tensor, atol=2e-3, rtol=2e-3)
    again = load_hparams({"method": method, **plain.manifest.hparams})
    assert resolved(again) == plain.manifest.hparams  # what was recorded makes the same run


def test_refine_too(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hp = edits.settings("memit", text)
    monkeypatch.setattr(room, "free_memory", lambda _: None)
    found = editors.fit(tiny.lm(), edits.request(), hp).manifest.hparams
    assert (found["batch_tokens"], found["refine"]["batch_tokens"]) == (2048, 1024)


def test_an_interrupted_run_goes_on_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, hp, work = tiny.lm(), load_hparams("memit"), Workspace(tmp_path, {})
    monkeypatch.setattr(room, "free_memory", lambda _: 1.0)
    first = room.settled(lm, hp, [0], work, QUIET)
    monkeypatch.setattr(room, "free_memory", lambda _: 1e15)
    again = room.settled(lm, hp, [0], work, QUIET)
    assert (
        first == again and again.batch_tokens == 256 and again.refine is not None and again.refine.batch_tokens == 256
    )
    assert room.settled(lm, hp, [0], Workspace(None, {}), QUIET).batch_tokens == 2048
    other = Workspace(tmp_path, {"of": "another run"})
    assert room.settled(lm, hp, [0], other, QUIET).batch_tokens == 2048 and not other.folder.exists()  # type: ignore[union-attr]
    other.put("values", {"loss": torch.zeros(1)})
    monkeypatch.setattr(room, "free_memory", lambda _: 1.0)
    assert room.settled(lm, hp, [0], other, QUIET).batch_tokens == 2048  # as it began


def test_numbers_that_are_given_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", refused)
    hp = load_hparams("memit", set=["batch_tokens=7", "refine.batch_tokens=9"])
    assert room.settled(tiny.lm(), hp, [0], Workspace(None, {}), QUIET) == hp


def test_what_was_found_is_no_other_request() -> None:
    asked = resolved(load_hparams("memit"))
    found = resolved(load_hparams("memit", set=["batch_tokens=512", "refine.batch_tokens=256"]))
    assert as_settled(asked, found) == found and as_settled(found, asked) == found
    assert as_settled(asked, {}) == asked


def test_a_dry_run_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = runs.build(tmp_path / "world")

    def told(bytes_free: float) -> dict[str, Any]:
        monkeypatch.setattr(free, "free_memory", lambda _: bytes_free)
        said = runs.call("apply", *world.flags(tmp_path / "run"), "--dry-run", "--json", "--device-map", "cpu")
        assert said.code == 0, said.err
        return json.loads(said.out)  # type: ignore[no-any-return]

    wide, tight = told(1e12), told(1.0)
    assert wide["batches"]["batch_tokens"] == 2048 and tight["batches"]["batch_tokens"] == 256
    key = "while optimising values"
    assert tight["memory_bytes"][key] <= wide["memory_bytes"][key]
