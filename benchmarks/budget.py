"""The default token budget of the second moments beside ten times the tokens: closed forms alone, 20 facts.

    OMP_NUM_THREADS=1 python benchmarks/budget.py --facts known_facts.json --text rest.txt \\
        --reading valid.txt first.txt --out benchmarks/results/budget.json

The default reads the shipped text. Ten times as many tokens are that text, then the files of ``--reading``, which must
not hold the text that perplexity is measured on (here WikiText's validation part and the first half of its test part).
The text that lookalikes are looked for in grows with it, as it does for a user. Refine is left out: it would repair
what a poor moment had broken. A finished run is not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path

import grid

from editunlearn.artifacts import atomic_write_text
from editunlearn.facts.text import documents
from editunlearn.hparams.pieces import LEAST_TOKENS

METHODS = ("memit", "alphaedit")
FACTS = 20


def joined(files: list[str], path: Path) -> str:
    """The shipped text and that of ``files`` as one file."""
    lines = [json.dumps({"text": text}) for source in ("general", *files) for text in documents(source)]
    atomic_write_text(path, "\n".join(lines) + "\n")
    return str(path)


def main() -> None:
    """Both budgets for each method."""
    p = grid.flags(__doc__)
    p.add_argument("--methods", nargs="+", default=METHODS)
    p.add_argument("--reading", nargs="+", required=True, help="text behind the shipped one, for ten times the tokens")
    p.add_argument("--joined", type=Path, default=Path("budget_text.jsonl"), help="where that text is put together")
    p.add_argument("--tokens", type=int, default=10 * LEAST_TOKENS, help="of keys of up to 4,000 dimensions")
    args = p.parse_args()
    more = (f"moments.text={joined(args.reading, args.joined)}", f"moments.tokens={args.tokens}")
    grid.run(
        [
            grid.Cell(f"{method}, {name}", method, size, "batch", (*args.set, "refine=null", *text))
            for method in args.methods
            for size in args.sizes or (FACTS,)
            for name, text in (("auto", ()), (f"{args.tokens:,} tokens", more))
        ],
        args,
        "benchmarks/budget.py",
    )


if __name__ == "__main__":
    main()
