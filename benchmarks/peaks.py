"""What `apply --dry-run` says of the memory against the peak that the run then has.

    OMP_NUM_THREADS=1 python benchmarks/peaks.py --out benchmarks/results/peaks.json

Each run is a process of its own, of which the operating system says how much was resident at most. The shapes are
random models in the form of Llama: nothing is forgotten there, but memory does not depend on that. Steps are cut down,
since the peak is reached in the first ones. What was measured is not measured again, but planned anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import random_models

METHODS = {
    "memit": ["refine.steps=3"],
    "alphaedit": ["refine.steps=3"],
    "rome": ["refine.steps=3"],
    "paper/memit": ["layers=auto", "value.steps=4"],
    "npo": ["train.epochs=1"],
    "rmu": ["train.epochs=1"],
    "wise": ["side.steps=4"],
    "grace": ["value.steps=4"],
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-30m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 16000},
    "llama-400m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "vocab_size": 32000},
}


def build(name: str, dtype: str, folder: Path) -> None:
    """A random model of one of the shapes, on the disk; torch is imported here."""
    random_models.llama(SHAPES[name], dtype).save_pretrained(folder)
    random_models.tokenizer(SHAPES[name]["vocab_size"]).save_pretrained(folder)


def planned(command: list[str]) -> float:
    """Bytes at the same time, as the dry run has them."""
    told = subprocess.run([*command, "--dry-run", "--json", "--quiet"], capture_output=True, text=True, check=True)
    return float(list(json.loads(told.stdout)["memory_bytes"].values())[-1])


def peak(command: list[str]) -> float:
    """Most bytes that a process had resident.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{shlex.join(command)}\n{said.read()[-2000:]}")
    return used.ru_maxrss * 1024.0


def command_of(model: str, dtype: str, method: str, place: Path, work: Path, facts: int) -> list[str]:
    """One run."""
    command = [sys.executable, "-m", "editunlearn.apply", "--hparams", method, "--model", str(place)]
    command += ["--facts", "data/general_facts.jsonl", "--limit", str(facts), "--retain", "data/demo_retain.jsonl"]
    command += ["--dtype", dtype, "--targets", "refusal:I don't know."]
    command += ["--set", "limits.perplexity=null", *(w for item in METHODS[method] for w in ("--set", item))]
    if not method.startswith(("wise", "grace")):
        command += ["--set", "limits.norm=null"]
    if model != "demo":
        command += ["--cache-dir", str(work / "cache")]
    return [*command, "--out", str(work / "runs" / model / method.replace("/", "-"))]


def key_of(one: dict[str, Any]) -> tuple[str, str, str]:
    """What tells a run."""
    return one["model"], one["dtype"], one["method"]


def table(commands: list[str], found: list[dict[str, Any]]) -> str:
    """Markdown of all runs."""
    lines = [*(f"    {command}" for command in commands), ""]
    lines += ["| model | method | planned, GB | peak, GB | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {one['model']}, {one['dtype']} | {one['method']} | {one['planned'] / 1e9:.2f} | {one['peak'] / 1e9:.2f} "
        f"| {one['ratio']:.2f} |"
        for one in found
    ]
    worst = max(found, key=lambda one: abs(one["ratio"] - 1))
    return "\n".join([*lines, "", f"Furthest apart: {worst['method']} on {worst['model']}, {worst['ratio']:.2f}.", ""])


def main() -> None:
    """All runs."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["demo:bfloat16", "llama-30m:float32", "llama-400m:bfloat16"])
    p.add_argument("--methods", nargs="+", default=list(METHODS))
    p.add_argument("--facts", type=int, default=12)
    p.add_argument("--work", type=Path, help="folder for models and runs that stay (default: a temporary one)")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--build", nargs=3, metavar=("SHAPE", "DTYPE", "DIR"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.build:
        build(args.build[0], args.build[1], Path(args.build[2]))
        return
    from editunlearn.artifacts import atomic_write_json, atomic_write_text

    done = json.loads(args.out.read_text()) if args.out.exists() else {"commands": [], "runs": []}
    peaks = {key_of(one): one["peak"] for one in done["runs"]}
    told = f"OMP_NUM_THREADS=1 python benchmarks/peaks.py {shlex.join(sys.argv[1:])}"
    done["commands"] = [*(command for command in done["commands"] if command != told), told]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for name, _, dtype in (model.partition(":") for model in args.models):
            place = Path(name) if name == "demo" else work / f"{name}-{dtype}"
            if name != "demo" and not (place / "config.json").exists():
                again = [sys.executable, __file__, "--out", str(args.out), "--build", name, dtype, str(place)]
                subprocess.run(again, check=True)
            for method in args.methods:
                key, command = (name, dtype, method), command_of(name, dtype, method, place, work, args.facts)
                said = planned(command)
                took = peaks.get(key) or peak([*command, "--fresh", "--force"])
                one = dict(zip(("model", "dtype", "method"), key, strict=True))
                found.append({**one, "planned": said, "peak": took, "ratio": said / took})
                sys.stdout.write(f"{found[-1]}\n")
                sys.stdout.flush()
                new = {key_of(one) for one in found}
                done["runs"] = sorted([*found, *(r for r in done["runs"] if key_of(r) not in new)], key=key_of)
                atomic_write_json(args.out, done)
                atomic_write_text(args.out.with_suffix(".md"), table(done["commands"], done["runs"]))


if __name__ == "__main__":
    main()
