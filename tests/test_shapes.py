"""The benchmark of shapes on the smallest of them: every stage has its row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import shapes


def test_every_stage_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "shapes.json"
    few = ["--facts", "2", "--steps", "1", "--refine-steps", "1", "--set", "moments.tokens=500"]
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--shapes", "tiny", *few, "--out", str(out)])
    shapes.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["stage"] for row in rows] == ["statistics", "values", "solve", "refine"]
    tokens, unit = rows[0]["of"].split()
    assert int(tokens) >= 500 and unit == "tokens"  # whole windows
    assert all(row["seconds"] > 0 and row["flop"] > 0 for row in rows)
    assert [row["share_of_machine"] is None for row in rows] == [False, False, True, False]
    assert out.with_suffix(".md").read_text().count("| tiny |") == 4
