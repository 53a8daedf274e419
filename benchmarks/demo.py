"""Wall time and peak memory of the README's command, stage by stage: a first run with an empty cache, and a second one.

python benchmarks/demo.py --out benchmarks/results/demo.json

What the first run printed goes to a text file beside the results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from editunlearn.artifacts import atomic_write_json, atomic_write_text

COMMAND = ["-m", "editunlearn.apply", "--hparams", "memit.yaml"]


def run(folder: Path, name: str) -> dict[str, Any]:
    """One run of the command; its own times and the whole process's."""
    out = folder / name
    start = time.perf_counter()
    printed = subprocess.run(
        [sys.executable, *COMMAND, "--out", str(out)],
        check=True,
        env={**os.environ, "EDITUNLEARN_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    seconds = time.perf_counter() - start
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    return {
        "run": name,
        "wall_seconds": round(seconds, 1),
        **json.loads((out / "timing.json").read_text()),
        "metrics": metrics,
        "printed": printed,
    }


def main() -> None:
    """Both runs."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results/demo.json"))
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(Path(folder), name) for name in ("first", "second")]
    printed = [made.pop("printed") for made in runs]
    atomic_write_text(args.out.with_suffix(".txt"), printed[0])
    atomic_write_json(
        args.out, {"command": "python benchmarks/demo.py", "measured": " ".join(["python", *COMMAND]), "runs": runs}
    )


if __name__ == "__main__":
    main()
