"""Put evaluations side by side on one page: ``python -m editunlearn.report --runs runs/evaluate --out report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editunlearn.cli import Checks, check_writable, parser, run_command

if TYPE_CHECKING:
    from editunlearn.console import Console

EXAMPLES = """\
  editunlearn evaluate --delta runs/memit --base --suite facts --facts forget.jsonl && editunlearn report
  editunlearn report --runs runs/evaluate/base runs/evaluate/memit other/results.json --out comparison"""


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("report", __doc__ or "", EXAMPLES)
    p.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        default=[Path("runs/evaluate")],
        metavar="DIR",
        help="results files, also TOFU_EVAL.json of open-unlearning, or folders with them (default: runs/evaluate)",
    )
    p.add_argument("--out", type=Path, default=Path("runs/report"), help="folder to write to (default: runs/report)")
    p.add_argument("--title", default="What was forgotten, what stayed", help="of the page")
    p.add_argument("--json", action="store_true", help="names of the files as JSON on standard output")
    p.add_argument("--quiet", action="store_true", help="only warnings and errors")
    p.set_defaults(verbose=0)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    from editunlearn.artifacts import atomic_write_together
    from editunlearn.evaluation.report import gathering, page

    checks = Checks()
    found = checks.run(lambda: gathering.gather(args.runs))
    checks.run(lambda: check_writable(args.out, "--out"))
    checks.finish()
    assert found is not None  # noqa: S101 - finish() raised otherwise
    sections = [page.section(suite, columns) for suite, columns in found.items()]
    written = {
        "report.html": page.html(args.title, sections),
        "report.md": page.markdown(args.title, sections),
        "report.csv": page.csv_text(sections),
    }
    atomic_write_together({args.out / name: text.encode() for name, text in written.items()})
    for part in sections:
        for verdict in part.verdicts:
            console.result(f"{part.suite}, {verdict.label}: {verdict.headline}")
        for note in part.notes:
            console.warn(f"{part.suite}: {note}")
    console.info(f"saved: {', '.join(written)} in {args.out}")
    console.result_json({name: str(args.out / name) for name in written})


if __name__ == "__main__":
    sys.exit(main())
