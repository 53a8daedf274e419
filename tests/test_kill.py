"""A run that is killed with SIGKILL and started again writes the same bytes as one that was left alone.

The moments of the kills are shares of the processor time of an uninterrupted run, or the appearance of a file, so that
they hit the same stages on a slow or busy machine. The processes are forked from one that has the libraries loaded: all
their time is work.
"""

from __future__ import annotations

import multiprocessing
import operator
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import World, build, environment, listing, quietly

from editunlearn.workspace import Workspace

SETTINGS = [
    *("layers=[0, 1]", "context_prefixes.count=2", "batch_tokens=8", "value.steps=40", "value.stop_loss=0"),
    *("refine.steps=13", "refine.text_length=32", "refine.floor=0", "moments.length=32", "moments.tokens=1000"),
]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.95)
"""Of the processor time of a whole run: when a run is killed."""
STAGES = ("values.safetensors", "refine.safetensors", "adapter_config.json")
"""Files on whose appearance a run is killed, early ones first."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("kill") / "world")


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[list[str]], Any]]:
    """Starts a command in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "editunlearn.apply", "editunlearn.pipeline", "editunlearn.editors.flow"])
    before = dict(os.environ)
    os.environ.update(environment())
    os.environ["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"  # a fork server finds nothing to load without

    def launch(words: list[str]) -> Any:
        process = context.Process(target=quietly, args=(words,))
        process.start()
        return process

    yield launch
    os.environ.clear()
    os.environ.update(before)


def _run(
    start: Callable[[list[str]], Any],
    words: list[str],
    until: Callable[[float], bool] | None = None,
    killed: list[bool] | None = None,
) -> float:
    """Run a command; returns the processor time that it took, in seconds.

    Args:
        until: of that time; the command is killed as soon as this is true.
        killed: gets whether that was before its end.
    """
    process = start(words)
    watched, used = psutil.Process(process.pid), 0.0
    while process.is_alive():
        try:
            used = sum(watched.cpu_times()[:2])
        except psutil.Error:
            break
        if until is not None and until(used):
            watched.kill()
            process.join()
            assert process.exitcode in (-signal.SIGKILL, 0)  # 0: it was done before the signal came
            if killed is not None:
                killed.append(process.exitcode != 0)
            return used
        time.sleep(0.005)
    process.join()
    assert process.exitcode == 0
    return used


def _files(folder: Path) -> dict[str, bytes]:
    """All files but those that name times and folders."""
    names = [n for n in sorted(listing(folder)) if Path(n).name not in ("timing.json", "README.md")]
    return {name: (folder / name).read_bytes() for name in names}


def _everything(folder: Path) -> set[str]:
    """Files and folders."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_apply(world: World, start: Callable[[list[str]], Any]) -> None:
    warm = world.cache
    _run(start, ["apply", *world.flags(world.root / "first", settings=SETTINGS)])  # fills the cache of general facts
    shutil.rmtree(warm / "moments")

    def words(name: str) -> list[str]:
        if not (cache := world.root / f"{name}-cache").exists():
            shutil.copytree(warm, cache)
        flags = ["--save", "lora", "--quiet", "--cache-dir", str(cache)]
        return ["apply", *world.flags(world.root / name, *flags, settings=SETTINGS)]

    def stage(name: str) -> set[str]:
        """The files that are there in full, also while a run works at them (``os.walk`` minds no folder that goes)."""
        return {file for place, _, files in os.walk(world.root / name) if ".tmp-" not in place for file in files}

    whole = _run(start, words("whole"))
    wanted, beside = _files(world.root / "whole"), _everything(world.root / "whole-cache")
    assert {"delta.safetensors", "delta.json", "results.json", "past_keys.safetensors"} < set(wanted)
    kills: dict[str, Callable[[float], bool]] = {}
    for share in SHARES:
        kills[f"killed-{share}"] = partial(operator.le, share * whole)
    for file in STAGES:
        kills[f"killed-{file}"] = lambda _, file=file: file in stage(f"killed-{file}")  # type: ignore[misc]
    stages, killed = set(), list[bool]()
    for name, until in kills.items():
        _run(start, words(name), until, killed)
        stages.add(frozenset(stage(name)))
        _run(start, words(name))
        assert _files(world.root / name) == wanted, name
        assert _everything(world.root / name) == _everything(world.root / "whole"), name
        assert _everything(world.root / f"{name}-cache") == beside, name
    # none yet, the values, the refined factors, what is saved: however fast the machine is
    assert len(stages) >= 4 and sum(killed) >= 8 + len(STAGES) - 1, (stages, killed)


def test_stats(world: World, start: Callable[[list[str]], Any]) -> None:
    sizes = ["--set", "moments.text=general", "--set", "moments.length=8", "--set", "moments.tokens=40000"]

    def words(name: str) -> list[str]:
        return ["stats", *world.stats_flags(world.root / name, *sizes, "--quiet")]

    whole = _run(start, words("stats-whole"))
    wanted, everything = _files(world.root / "stats-whole"), _everything(world.root / "stats-whole")
    assert wanted
    unfinished = 0
    random_ = random.Random(0)
    for number in range(10):
        share, name = random_.uniform(0.3, 0.95), f"stats-{number}"
        _run(start, words(name), partial(operator.le, share * whole))
        cache = world.root / name
        unfinished += bool(cache.exists() and [p for p in listing(cache) if p.endswith("partial.safetensors")])
        _run(start, words(name))
        assert _files(cache) == wanted, name
        assert _everything(cache) == everything, name
    assert unfinished >= 1


def test_a_damaged_piece_counts_as_missing(tmp_path: Path) -> None:
    import torch

    work = Workspace(tmp_path, {"a": 1})
    work.put("values", {"x": torch.ones(3)})
    assert work.get("values") is not None and work.folder is not None
    path = work.folder / "values.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert work.get("values") is None and work.get("refine") is None
