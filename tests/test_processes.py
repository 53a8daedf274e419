"""Statistics by two processes are those of one, launched by torchrun's variables or Slurm's."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file

from editunlearn.lm.processes import Processes, launched

TORCHRUN = [
    {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} for rank in (0, 1)
]
SLURM = [
    {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    }
    for rank in (0, 1)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> runs.World:
    made = runs.build(tmp_path_factory.mktemp("processes") / "world")
    lines = [f"{i}. {line}" for i in range(40) for line in (runs.TEXT.split("\n\n")[0], "Birds sing in the morning.")]
    (made.root / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return made


def moments(cache: Path) -> list[torch.Tensor]:
    found = sorted((cache / "moments").rglob("moment.safetensors"))
    return [load_file(path)["moment"] for path in found]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize("launcher", [TORCHRUN, SLURM])
def test_two_processes_give_the_moments_of_one(
    launcher: list[dict[str, str]], world: runs.World, tmp_path: Path
) -> None:
    flags = [*world.stats_flags(tmp_path / "one"), "--set", "moments.length=32", "--json"]
    assert runs.call("stats", *flags).code == 0
    flags[flags.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    port = free_port()
    command = runs.argv("editunlearn.stats", *flags)
    working = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**runs.environment(), **place, "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in launcher
    ]
    said = [process.communicate(timeout=300) for process in working]
    assert [process.returncode for process in working] == [0, 0], said
    assert len(json.loads(said[0][0])) == 1 and said[1][0] == ""  # one of them speaks
    (alone,), (together,) = moments(tmp_path / "one"), moments(tmp_path / "two")
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert not list((tmp_path / "two").rglob("partial.safetensors"))


def test_more_processes_than_batches(world: runs.World, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(runs.TEXT.split("\n\n")[0], encoding="utf-8")
    flags = world.stats_flags(tmp_path / "cache", "--set", f"moments.text={short}", "--set", "moments.length=32")
    port = free_port()
    command = runs.argv("editunlearn.stats", *flags)
    working = [
        subprocess.Popen(command, cwd=tmp_path, env={**runs.environment(), **place, "MASTER_PORT": port})
        for place in TORCHRUN
    ]
    assert [process.wait(timeout=300) for process in working] == [0, 0]
    assert len(moments(tmp_path / "cache")) == 1


def test_what_the_launcher_says() -> None:
    assert launched({}) == Processes() == launched({"WORLD_SIZE": "1", "RANK": "0"})
    assert launched(TORCHRUN[1]) == Processes(1, 2, 1) == launched(SLURM[1])
    # a shell inside of an allocation is no step of four
    assert launched({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Processes()
    shares = [list(Processes(rank, 3).share(range(7))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
