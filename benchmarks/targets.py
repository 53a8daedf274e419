"""What is said instead: one text for all, one of the bank for each fact, the model's own words; and what that costs.

    python benchmarks/targets.py --facts known_facts.json --text test.txt --out benchmarks/results/targets.json

Leak, refusal, retained and held-out accuracy, perplexity and fluency after an edit of the same facts. How natural the
texts are before any edit is in ``refusals.py``. A finished run is not repeated.
"""

from __future__ import annotations

import grid

from editunlearn.facts.targets import DEFAULT_TARGETS

TARGETS = (DEFAULT_TARGETS, "refusal", "self")


def main() -> None:
    """All runs."""
    p = grid.flags(__doc__)
    p.add_argument("--methods", nargs="+", default=("memit",))
    p.add_argument("--targets", nargs="+", default=TARGETS)
    args = p.parse_args()
    grid.run(
        [
            grid.Cell(", ".join([name, targets, *args.set]), name, size, set=tuple(args.set), targets=targets)
            for size in args.sizes or (20,)
            for name in args.methods
            for targets in args.targets
        ],
        args,
        "benchmarks/targets.py",
    )


if __name__ == "__main__":
    main()
