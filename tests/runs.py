"""Commands on a tiny model, in this process or another one, for the tests of the command line."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

from editunlearn.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
FACTS = [
    {
        "id": "darrieux",
        "subject": "Danielle Darrieux",
        "prompt": "The mother tongue of Danielle Darrieux is",
        "answer": "French",
        "paraphrases": ["Danielle Darrieux spoke"],
        "neighbors": [{"prompt": "The mother tongue of Ana Petrova is", "answer": "Russian"}],
    },
    {"id": "france", "subject": "France", "prompt": "The capital of France is", "answer": "Paris"},
]
RETAIN = [
    {"id": "japan", "subject": "Japan", "prompt": "The capital of Japan is", "answer": "Tokyo"},
    {"id": "italy", "subject": "Italy", "prompt": "The capital of Italy is", "answer": "Rome"},
]
TEXT = "\n\n".join(["A river runs through the old town; the bridge over it was built in 1783."] * 4)
QUICK = [
    "layers=[0]",
    "moments.length=32",
    "context_prefixes.count=1",
    "value.steps=3",
    "refine.steps=3",
    "refine.kept_keys=0.001",  # tiny models, large steps
    "refine.text_length=32",
]

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


MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@dataclass(frozen=True)
class World:
    """A folder with a tiny model that knows the facts, the facts, a text, and a cache that all tests share."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def flags(self, out: Path | str | None, *more: str, settings: list[str] = QUICK) -> list[str]:
        """Flags of a quick ``apply`` run."""
        flags = ["--hparams", "memit", "--model", str(self.model), "--cache-dir", str(self.cache)]
        flags += ["--facts", str(self.root / "facts.jsonl"), "--retain", str(self.root / "retain.jsonl")]
        for item in [f"moments.text={self.root / 'text.txt'}", *settings]:
            flags += ["--set", item]
        return [*flags, *(["--out", str(out)] if out is not None else []), *more]

    def stats_flags(self, cache: Path, *more: str) -> list[str]:
        """Flags of a quick ``stats`` run."""
        text = f"moments.text={self.root / 'text.txt'}"
        return [
            "--hparams",
            "memit",
            "--model",
            str(self.model),
            "--cache-dir",
            str(cache),
            "--set",
            text,
            "--set",
            "layers=[0]",
            *more,
        ]


def build(root: Path) -> World:
    """Fill an empty folder."""
    root.mkdir()
    known = [(str(f["prompt"]), str(f["answer"])) for f in FACTS + RETAIN]
    lm = tiny.taught_lm([*known, ("The mother tongue of Ana Petrova is", "Russian")])
    lm.model.save_pretrained(root / "model")
    lm.tokenizer.save_pretrained(root / "model")
    write_lines(root / "facts.jsonl", FACTS)
    write_lines(root / "retain.jsonl", RETAIN)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return World(root)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Called:
    """What a command did."""

    code: int
    out: str
    err: str


def call(command: str, *flags: str) -> Called:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([command, *flags])
    return Called(code, out.getvalue(), err.getvalue())


def finish(world: World) -> tuple[Path, Called]:
    """A run with everything saved, which tests only read."""
    out = world.root / "run"
    return out, call("apply", *world.flags(out, "--save", "lora,merged"))


def argv(*words: str) -> list[str]:
    """``python -m ...`` of this interpreter."""
    return [sys.executable, "-m", *words]


def environment() -> dict[str, str]:
    """For subprocesses: this checkout, one thread."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def spawn(*words: str, cwd: Path) -> Called:
    """Run ``python -m ...`` in another process."""
    done = subprocess.run(argv(*words), cwd=cwd, env=environment(), capture_output=True, text=True)
    return Called(done.returncode, done.stdout, done.stderr)


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def started(launcher: list[dict[str, str]], cwd: Path, *words: str) -> list[subprocess.Popen[str]]:
    """The same command in processes that know of each other, by what a launcher sets (``TORCHRUN``, ``SLURM``)."""
    port = free_port()
    return [
        subprocess.Popen(
            argv(*words),
            cwd=cwd,
            env={**environment(), **place, "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in launcher
    ]


def ended(working: list[subprocess.Popen[str]]) -> list[Called]:
    """What they did, when all have ended."""
    said = [process.communicate(timeout=1200) for process in working]
    return [Called(process.returncode, *text) for process, text in zip(working, said, strict=True)]


def launch(launcher: list[dict[str, str]], cwd: Path, *words: str) -> list[Called]:
    """The same command in processes that know of each other, to their end."""
    return ended(started(launcher, cwd, *words))


def listing(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def quietly(words: list[str]) -> None:
    """Run a command in this process, which then ends with its exit code; what it prints is dropped."""
    import torch

    torch.set_num_threads(1)
    called = call(*words)
    if called.code:
        sys.__stderr__.write(called.err) if sys.__stderr__ else None
    os._exit(called.code)
