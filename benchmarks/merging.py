"""Query merging: ROME and MEMIT at 10 to 400 forget samples, each with a value of its own, or merged.

    python benchmarks/merging.py --facts known_facts.json --text test.txt --out benchmarks/results/merging.json

Merged by subject and in runs (with a key for each sample, or one for each group), and with one value for all;
``--variants``, ``--forms`` and ``--sizes`` choose. The closed
forms alone are run as well, as refine repairs what a collapse has left. Fluency is the n-gram entropy of what is said
to held-out prompts. A finished run is not repeated.
"""

from __future__ import annotations

import grid

METHODS = ("rome", "memit")
SIZES = (10, 40, 100, 400)
MERGED = {
    "unmerged": (),
    "merged by subject": ("merge.by=subject",),
    "merged by subject with one key": ("merge.by=subject", "merge.keys=group"),
    "merged in runs of 10": ("merge.by=run", "merge.size=10"),
    "merged in runs of 10 with one key": ("merge.by=run", "merge.size=10", "merge.keys=group"),
    "one value for all": ("merge.by=all",),
}


def main() -> None:
    """All runs; small ones first."""
    p = grid.flags(__doc__)
    p.add_argument("--variants", nargs="+", choices=MERGED, default=list(MERGED))
    p.add_argument("--forms", nargs="+", choices=grid.FORMS, default=list(grid.FORMS))
    args = p.parse_args()
    grid.run(
        [
            grid.Cell(
                f"{method}, {name}{grid.FORMS[form][0]}",
                method,
                size,
                set=(*args.set, *MERGED[name], *grid.FORMS[form][1]),
            )
            for size in args.sizes or SIZES
            for method in METHODS
            for form in args.forms
            for name in args.variants
        ],
        args,
        "benchmarks/merging.py",
    )


if __name__ == "__main__":
    main()
