"""Resuming, seeds, caches, and that nothing is hidden in modules."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from edits import CLOSED_FORM, Killed, fact, relative, request, same_delta, settings
from torch import Tensor

import editunlearn
from editunlearn import editors
from editunlearn.console import Console
from editunlearn.editors import contexts, moments, objective, refine, values
from editunlearn.errors import InputError
from editunlearn.facts.records import ForgetRequest
from editunlearn.facts.text import documents
from editunlearn.hparams import load_hparams
from editunlearn.lm.windows import windows
from editunlearn.numerics import projector, solve
from editunlearn.pipeline import run_inputs
from editunlearn.workspace import Workspace, key_of


@pytest.mark.parametrize(("kind", "how"), [("llama", "joint"), ("gemma3_text", "residual")])
def test_resumed_values_equal_uninterrupted_ones(tmp_path: Path, text: str, kind: str, how: str) -> None:
    lm = tiny.lm(kind)
    hp = settings("memit", text, "batch_tokens=1", f"value.spread={how}")
    whole = editors.fit(lm, request(), hp)
    optimise, calls = values.Together.solve, []

    def killed(self: Any, names: Sequence[int]) -> Any:
        calls.append(tuple(names))
        if len(calls) == 3:
            raise Killed
        return optimise(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values.Together, "solve", killed)
        with pytest.raises(Killed):
            editors.fit(lm, request(), hp, work=Workspace(tmp_path, {"run": 1}))
        resumed = editors.fit(lm, request(), hp, work=Workspace(tmp_path, {"run": 1}))
    assert len(calls) == 4 and calls[2] == calls[3]  # the two finished facts are not optimised again
    assert same_delta(whole, resumed)
    left = sorted(p.name for p in Workspace(tmp_path, {"run": 1}).folder.iterdir())  # type: ignore[union-attr]
    assert left == ["refine.safetensors", "values.safetensors"]


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.bfloat16), ("gemma3_text", torch.float32)])
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_resumed_refinement_equals_an_uninterrupted_one(
    tmp_path: Path, text: str, kind: str, dtype: torch.dtype, stop: int
) -> None:
    lm = tiny.lm(kind, dtype=dtype, hidden=64)
    # a row meets other rows, and other padding, when it comes up after the interruption instead of before
    batches_of = (f"refine.{pool}_batch=3" for pool in ("forget", "retain", "text"))
    hp = settings("memit", text, "refine.steps=12", *batches_of)
    keep = [replace(fact(3 + i % 3, None), id=str(i), answer="and so on " * i + "end") for i in range(14)]
    asked = ForgetRequest(tuple(fact(i) for i in range(5)), tuple(keep))
    seen: list[int] = []
    unedited: list[Tensor] = []
    hidden_at_targets = objective.hidden_at_targets

    def noted(lm: Any, padded: Any) -> Tensor:
        if not torch.is_grad_enabled():
            unedited.append(padded.input_ids)
        return hidden_at_targets(lm, padded)

    class Loud(Console):
        def detail(self, message: str, level: int = 1) -> None:
            if not message.startswith("refine "):
                return
            seen.append(int(message.split()[1].rstrip(":")))
            if len(seen) == stop:
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "hidden_at_targets", noted)
        whole = editors.fit(lm, asked, hp)
        batches = [ids.tolist() for ids in unedited]
        with pytest.raises(Killed):
            editors.fit(lm, asked, hp, work=Workspace(tmp_path, {}), console=Loud(quiet=True))
        unedited.clear()
        resumed = editors.fit(lm, asked, hp, work=Workspace(tmp_path, {}), console=Loud(quiet=True))
    # the size of a batch can change the last bits of its rows
    assert [ids.tolist() for ids in unedited] == batches
    assert seen == [*range(1, stop + 1), *range(1 + refine.CHECKPOINT * (stop // refine.CHECKPOINT), 13)]
    assert same_delta(whole, resumed)


def test_the_same_seed_gives_the_same_delta(text: str) -> None:
    lm = tiny.lm()
    draws = ("refine.forget_batch=1", "refine.retain_batch=1", "refine.contexts=2")
    one, same, other = (
        editors.fit(lm, request(), settings("memit", text, *draws, f"seed={seed}")) for seed in (0, 0, 1)
    )
    assert same_delta(one, same) and not same_delta(one, other)


def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every forward pass over text."""
    seen: list[int] = []
    add = moments.add_windows
    monkeypatch.setattr(moments, "add_windows", lambda *a: (seen.append(1), add(*a))[1])
    return seen


def test_second_moments_are_cached_under_all_their_inputs(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measurements(monkeypatch)
    lm, console = tiny.lm(), Console(quiet=True)
    hp = settings("memit", text).moments

    def get(lm: Any = lm, hp: Any = hp, layers: Sequence[int] = (0,), **options: Any) -> tuple[dict[str, Tensor], bool]:
        seen.clear()
        sites = lm.layout.sites(layers)
        found = {n: m.moment for n, m in moments.get(lm, sites, hp, tmp_path / "cache", console, **options).items()}
        return found, bool(seen)

    first, measured = get()
    assert measured and not get()[1]
    again = get()[0]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert get(layers=(0, 1))[1] and not get(layers=(1,))[1]  # only what is missing
    assert get(hp=hp.model_copy(update={"tokens": 100}))[1]
    assert get(hp=hp.model_copy(update={"length": 16}))[1]
    assert not get(hp=hp.model_copy(update={"weight": 1.0}))[1]  # used later, not measured
    moved = tmp_path / "moved.txt"
    moved.write_text(Path(text).read_text())
    assert not get(hp=hp.model_copy(update={"text": str(moved)}))[1]  # the same text elsewhere
    moved.write_text(Path(text).read_text().replace("Tokyo", "Kyoto"))
    assert get(hp=hp.model_copy(update={"text": str(moved)}))[1]
    assert get(lm=tiny.lm(seed=1))[1]
    assert get(lm=tiny.lm(dtype=torch.bfloat16))[1]
    assert get(lm=tiny.lm(add_bos=False))[1]
    assert get(fresh=True)[1]
    with torch.no_grad():
        next(lm.model.parameters())[5, 5] += 1e-3
    assert get()[1]
    moved.write_text(" ")
    with pytest.raises(InputError, match="has no text"):
        get(hp=hp.model_copy(update={"text": str(moved)}))


def test_moments_stay_on_the_disk(tmp_path: Path, text: str) -> None:
    lm, hp, console = tiny.lm(), settings("memit", text).moments, Console(quiet=True)
    sites = lm.layout.sites((0, 1))
    for _ in range(2):  # measured, and found
        for found in moments.get(lm, sites, hp, tmp_path / "cache", console).values():
            assert found.held is None and found.moment.shape == (found.width, found.width)
    beside = moments.get(lm, sites, hp, None, console)
    assert all(m.held is not None and torch.equal(m.moment, m.held) for m in beside.values())
    damaged, lost = moments.get(lm, sites, hp, tmp_path / "cache", console).values()
    assert damaged.store.folder is not None and lost.store.folder is not None
    (damaged.store.folder / "moment.safetensors").write_bytes(b"nothing")
    again = moments.get(lm, sites, hp, tmp_path / "cache", console)
    assert torch.equal(again[sites[0].name].moment, beside[sites[0].name].moment)
    (lost.store.folder / "moment.safetensors").unlink()
    with pytest.raises(InputError, match="was removed while it was needed"):
        _ = lost.moment


def test_an_interrupted_measurement_goes_on(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "WORK_PER_SAVING", 0.0)
    monkeypatch.setattr(moments, "WINDOWS", 2)
    lm, hp, console = tiny.lm(), settings("memit", text).moments, Console(quiet=True)
    sites = lm.layout.sites([0, 1])
    whole = moments.get(lm, sites, hp, None, console)
    add, passes = moments.add_windows, []

    def killed(*arguments: Any) -> int:
        passes.append(1)
        if len(passes) == 4:
            raise Killed
        return add(*arguments)

    monkeypatch.setattr(moments, "add_windows", killed)
    with pytest.raises(Killed):
        moments.get(lm, sites, hp, tmp_path, console)
    interrupted = len(passes)
    resumed = moments.get(lm, sites, hp, tmp_path, console)
    pieces = list(windows(lm, documents(text), hp.length, hp.tokens))
    batches = moments._batches(pieces)
    assert sorted(p for part in batches for p in part) == sorted(pieces)
    assert interrupted == 4 and len(passes) - interrupted == len(batches) - 3
    assert all(torch.equal(whole[n].moment, resumed[n].moment) for n in whole)
    assert not list(tmp_path.rglob("partial*"))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_measurement_killed_among_its_last_files_leaves_nothing(
    kept: int, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "WORK_PER_SAVING", 0.0)
    monkeypatch.setattr(moments, "WINDOWS", 2)
    lm, hp, console = tiny.lm(), settings("memit", text).moments, Console(quiet=True)
    sites = lm.layout.sites([0, 1])
    whole = moments.get(lm, sites, hp, tmp_path / "whole", console)
    put, puts = Workspace.put, []

    def put_until(self: Workspace, name: str, tensors: Any) -> None:
        if name == "moment" and len(puts) == kept:
            raise Killed
        puts.extend([name] if name == "moment" else [])
        put(self, name, tensors)

    def never(self: Workspace) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Workspace, "put", put_until)
        patch.setattr(Workspace, "remove", never)
        moments.get(lm, sites, hp, tmp_path / "killed", console)
    assert len(puts) == kept and len(list((tmp_path / "killed").rglob("partial*"))) == 1
    add, passes = moments.add_windows, []
    monkeypatch.setattr(moments, "add_windows", lambda *a: (passes.append(a[1]), add(*a))[1])
    again = moments.get(lm, sites, hp, tmp_path / "killed", console)
    assert all(torch.equal(whole[n].moment, again[n].moment) for n in whole)
    assert passes == ([] if kept == 2 else [sites[kept:]])  # only what came after the last saving, of what is missing
    assert _everything(tmp_path / "killed") == _everything(tmp_path / "whole")


def _everything(folder: Path) -> set[Path]:
    """Files and folders."""
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.parametrize(("method", "more"), [("memit", ""), ("alphaedit", "nullspace.soft=false")])
def test_what_depends_on_the_second_moment_alone_is_made_once(
    method: str, more: str, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, made = tiny.lm(), []
    inverse, null_space = solve.inverse, projector.null_space
    monkeypatch.setattr(solve, "inverse", lambda c: (made.append(1), inverse(c))[1])
    monkeypatch.setattr(projector, "null_space", lambda *a, **k: (made.append(1), null_space(*a, **k))[1])
    hp = settings(method, text, "retain.weight=0", "refine=null", *filter(None, [more]))
    first = editors.fit(lm, request(), hp, cache=tmp_path)
    assert len(made) == len(first.factors)
    assert same_delta(first, editors.fit(lm, request(), hp, cache=tmp_path)) and len(made) == len(first.factors)
    editors.fit(tiny.lm(seed=1), request(), hp, cache=tmp_path)
    assert len(made) == 2 * len(first.factors)


def test_second_moments_equal_the_literal_ones(text: str) -> None:
    for kind in ("gemma3_text", "opt"):
        lm, hp = tiny.lm(kind), settings("memit", text).moments
        found = moments.get(lm, lm.layout.sites([1]), hp, None, Console(quiet=True))
        pieces = list(windows(lm, documents(text), hp.length, hp.tokens))
        assert all(p[0] == lm.bos_id and 1 < len(p) <= 32 for p in pieces)
        assert relative(found[lm.layout.site(1).name].moment, reference.second_moment(lm, 1, pieces)) < 1e-5
    bare = tiny.lm(add_bos=False)
    assert all(bare.tokenizer.bos_token_id not in p for p in windows(bare, documents(text), 32, 100))


def test_context_prefixes_are_cached_under_all_their_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = contexts.context_prefixes
    monkeypatch.setattr(contexts, "context_prefixes", lambda *a: (made.append(1), make(*a))[1])
    lm, hp = tiny.lm(), load_hparams("memit", set=["context_prefixes={count: 2, tokens: 5}"]).context_prefixes
    one = contexts.prefixes(lm, hp, tmp_path)
    assert contexts.prefixes(lm, hp, tmp_path) == one and len(made) == 1
    assert contexts.prefixes(lm, hp, None) == one and len(made) == 2
    for number, (model, changed) in enumerate(
        [
            (lm, {"count": 1}),
            (lm, {"tokens": 6}),
            (lm, {"seed": 1}),
            (tiny.lm(seed=1), {}),
            (tiny.lm(add_bos=False), {}),
        ],
        3,
    ):
        contexts.prefixes(model, hp.model_copy(update=changed), tmp_path)
        assert len(made) == number, changed
    assert contexts.prefixes(lm, hp.model_copy(update={"count": 0}), tmp_path) == []


def test_a_workspace_belongs_to_its_inputs(tmp_path: Path) -> None:
    work = Workspace(tmp_path, {"a": 1, "b": [2]})
    assert work.get("x") is None
    work.put("x", {"t": torch.arange(6).reshape(2, 3).T})
    assert torch.equal((work.get("x") or {})["t"], torch.arange(6).reshape(2, 3).T)
    assert Workspace(tmp_path, {"b": [2], "a": 1}).get("x") is not None
    assert Workspace(tmp_path, {"a": 1, "b": [3]}).get("x") is None
    work.drop("x")
    work.drop("x")
    assert work.get("x") is None
    work.put("x", {"t": torch.zeros(1)})
    assert Workspace(tmp_path, {"a": 1, "b": [2]}, fresh=True).get("x") is None
    nothing = Workspace(None, {})
    nothing.put("x", {"t": torch.zeros(1)})
    nothing.drop("x")
    nothing.remove()
    assert nothing.get("x") is None
    assert key_of({"a": 1}) != key_of({"a": 2}) and len(key_of({})) == 32
    with pytest.raises(TypeError):
        key_of({"a": {1}})


def test_nothing_is_kept_in_modules(text: str) -> None:
    def containers() -> dict[str, str]:
        return {
            f"{name}.{key}": repr(value)
            for name, module in sorted(sys.modules.items())
            if name.startswith("editunlearn")
            for key, value in vars(module).items()
            if not key.startswith("__") and isinstance(value, list | dict | set)
        }

    lm = tiny.lm()
    for one in pkgutil.walk_packages(editunlearn.__path__, "editunlearn."):  # else those imported on the way are new
        if not one.name.endswith("__main__"):
            importlib.import_module(one.name)
    before = containers()
    for method in editors.names():
        more = ["refine.steps=1", "value.steps=1"] if method in CLOSED_FORM else []
        editors.fit(lm, request(), settings(method, text, *more))
    assert containers() == before


def test_importing_sets_nothing() -> None:
    code = """
import logging, os, random, torch
before = dict(os.environ), torch.random.get_rng_state(), random.getstate(), torch.get_num_threads()
dtype = torch.get_default_dtype()
root = logging.getLogger().level, list(logging.getLogger().handlers)
import editunlearn
import editunlearn
from editunlearn import editors
import editunlearn.editors.flow, editunlearn.lm.loading, editunlearn.lm.generation, editunlearn.facts.text
[editors.module(name) for name in editors.names()]
assert dict(os.environ) == before[0] and torch.equal(torch.random.get_rng_state(), before[1])
assert random.getstate() == before[2] and torch.get_num_threads() == before[3]
assert torch.get_default_dtype() == dtype and torch.is_grad_enabled()
assert (logging.getLogger().level, list(logging.getLogger().handlers)) == root
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_a_run_belongs_to_the_text_and_the_template(tmp_path: Path) -> None:
    path, lm = tmp_path / "text.txt", tiny.lm("llama")
    path.write_text("Some birds sing in the morning.")

    def key() -> str:
        return key_of(run_inputs(lm, request(), settings("memit", str(path)), "refusal", None))

    first = key()
    assert key() == first
    path.write_text("Some birds sing in the evening.")
    second = key()
    lm.tokenizer.chat_template = "{{ messages[0].content }}"
    assert len({first, second, key()}) == 3
