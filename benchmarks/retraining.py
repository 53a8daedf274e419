"""How many times cheaper than pretraining the seven methods of arXiv 2402.15159 are, from counted operations.

    python benchmarks/retraining.py --out benchmarks/results/retraining.json

Yi-6B (3e12 tokens of pretraining, by its model card) and the paper's shares of arXiv and GitHub, one epoch, one chunk
of 4,096 tokens a sample. Nothing is trained: the tensors are fake ones, whose shapes are counted. Seconds.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from editunlearn.artifacts import atomic_write_json, atomic_write_text
from editunlearn.comparing.retraining import SEVEN, per_token, times_cheaper

YI = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 64000,
}
PRETRAINING, CHUNK = 3e12, 4096
SAMPLES = {"arXiv": 500, "GitHub": 2000}


def main() -> None:
    """Count, and write JSON and a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, type=Path)
    args = p.parse_args()
    token = per_token(LlamaConfig(**YI), CHUNK)
    times = {
        method: {name: times_cheaper(token, PRETRAINING, samples * CHUNK, passes) for name, samples in SAMPLES.items()}
        for method, passes in SEVEN.items()
    }
    found = {
        "command": shlex.join(["python", "benchmarks/retraining.py", *sys.argv[1:]]),
        "model": YI,
        "pretraining_tokens": PRETRAINING,
        "chunk": CHUNK,
        "samples": SAMPLES,
        "flops_of_a_token": {"read": token.read, "trained": token.trained},
        "times_cheaper": times,
    }
    atomic_write_json(args.out, found)
    atomic_write_text(args.out.with_suffix(".md"), table(found))
    sys.stdout.write(table(found))


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    token, names = found["flops_of_a_token"], list(found["samples"])
    lines = [
        f"    {found['command']}",
        "",
        f"A token of a {found['chunk']:,}-token chunk takes {token['read']:.3g} FLOPs to read and "
        f"{token['trained']:.3g} to train on; pretraining: {found['pretraining_tokens']:.2g} tokens.",
        "",
        "| method | " + " | ".join(f"{name}, {found['samples'][name]:,} samples" for name in names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    rows = found["times_cheaper"].items()
    lines += [f"| {method} | " + " | ".join(f"{by[name]:.2g} times" for name in names) + " |" for method, by in rows]
    least = min(value for _, by in rows for value in by.values())
    holds = "holds" if least > 1e5 else "does not hold"
    return "\n".join([*lines, "", f"More than 10^5 times cheaper {holds}: {least:.2g} times at least."]) + "\n"


if __name__ == "__main__":
    main()
