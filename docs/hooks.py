"""For ``mkdocs``: what pages show of ``benchmarks/results``, which is outside of ``docs``, is put into the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """The result files themselves; tables of numbers in Markdown stay as they are."""
    for path in sorted(RESULTS.iterdir()):
        if path.is_file():
            place = f"benchmarks/results/{path.name}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are right in the repository become right in the site."""
    return markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
