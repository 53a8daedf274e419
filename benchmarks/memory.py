"""Memories beside editors of weights: 1 to 200 facts, in one request and in ten.

    python benchmarks/memory.py --facts known_facts.json --text test.txt --out benchmarks/results/memory.json

Leak, refusal, retained and held-out accuracy, perplexity and latency of WISE and GRACE next to ROME, MEMIT and
AlphaEdit. Facts, retain set and held-out facts share no subject; those to forget are the same for all methods, and
those of a small run are the first of a larger one. A finished run is not repeated.
"""

from __future__ import annotations

import grid

METHODS = ("wise", "grace", "rome", "memit", "alphaedit")
SIZES = (1, 10, 50, 200)


def main() -> None:
    """All runs; small ones first."""
    p = grid.flags(__doc__)
    p.add_argument("--methods", nargs="+", default=METHODS)
    args = p.parse_args()
    grid.run(
        [
            grid.Cell(name, name, size, way, tuple(args.set))
            for size in args.sizes or SIZES
            for name in args.methods
            for way in (("batch", "sequential") if size > 1 else ("batch",))
        ],
        args,
        "benchmarks/memory.py",
    )


if __name__ == "__main__":
    main()
