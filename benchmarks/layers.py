"""`layers: auto` beside fixed windows of as many blocks, all the way up: MEMIT, or another editor.

    OMP_NUM_THREADS=1 python benchmarks/layers.py --facts known_facts.json --text test.txt \\
        --out benchmarks/results/layers.json

The closed form alone shows what the blocks can do by themselves: refine repairs much of what a bad choice has broken.
It is run with weaker preservation than by default, without which it forgets too little to compare. The facts are the
same for all windows. A finished run is not repeated.
"""

from __future__ import annotations

import grid

WINDOWS = ((0, 3), (2, 5), (4, 7), (6, 9), (8, 11), (11, 14), (14, 17))
FACTS = 20
FORMS = {"closed": ("refine=null", "moments.weight=1000", "retain.weight=1"), "refined": ()}


def main() -> None:
    """All windows."""
    p = grid.flags(__doc__)
    p.add_argument("--method", default="memit")
    p.add_argument("--windows", nargs="+", default=[f"{first}-{last}" for first, last in WINDOWS], metavar="FIRST-LAST")
    p.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = p.parse_args()
    sets = {"auto": ()}
    for window in args.windows:
        first, last = map(int, window.split("-"))
        sets[f"blocks {window}"] = (f"layers={list(range(first, last + 1))}",)
    grid.run(
        [
            grid.Cell(f"{args.method} {form}, {name}", args.method, size, "batch", (*args.set, *FORMS[form], *layers))
            for form in args.forms
            for size in args.sizes or (FACTS,)
            for name, layers in sets.items()
        ],
        args,
        "benchmarks/layers.py",
    )


if __name__ == "__main__":
    main()
