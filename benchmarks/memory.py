"""Memories beside editors of weights: 1 to 200 facts, in one request and in ten.

    python benchmarks/memory.py --facts known_facts.json --text test.txt --out benchmarks/results/memory.json

Leak, refusal, retained and held-out accuracy, perplexity and latency of WISE and GRACE next to ROME, MEMIT and
AlphaEdit, these both as shipped and by their closed forms alone: refine takes most of the time, hours for 200 facts.
``--sizes``, ``--forms`` and ``--ways`` choose; runs of several commands gather in one file. Facts, retain set and
held-out facts share no subject; those to forget are the same for all methods, and those of a small run are the first of
a larger one. A finished run is not repeated.
"""

from __future__ import annotations

import grid

MEMORIES = ("wise", "grace")
EDITORS = ("rome", "memit", "alphaedit")
SIZES = (1, 10, 50, 200)
WAYS = ("batch", "sequential")


def main() -> None:
    """All runs; small ones first."""
    p = grid.flags(__doc__)
    p.add_argument("--methods", nargs="+", default=(*MEMORIES, *EDITORS))
    p.add_argument(
        "--forms", nargs="+", choices=grid.FORMS, default=list(grid.FORMS), help="of methods that are refined"
    )
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = p.parse_args()
    cells = [
        grid.Cell(f"{name}{words}", name, size, way, (*args.set, *alone))
        for size in args.sizes or SIZES
        for name in args.methods
        for words, alone in ([grid.FORMS["shipped"]] if name in MEMORIES else [grid.FORMS[form] for form in args.forms])
        for way in (args.ways if size > 1 else ("batch",))
    ]
    grid.run(cells, args, "benchmarks/memory.py")


if __name__ == "__main__":
    main()
