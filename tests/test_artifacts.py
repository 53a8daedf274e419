"""Files that are written in one step."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from editunlearn import artifacts


def _fail(*_: object) -> None:
    raise OSError("killed")


def test_writes_and_makes_parents(tmp_path: Path) -> None:
    artifacts.atomic_write_bytes(tmp_path / "a" / "b.bin", b"\x00\xff")
    artifacts.atomic_write_text(tmp_path / "t.txt", "Zoë\n")
    artifacts.atomic_write_json(tmp_path / "j.json", {"b": 1, "a": "ü"})
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t.txt").read_text(encoding="utf-8") == "Zoë\n"
    assert json.loads((tmp_path / "j.json").read_text(encoding="utf-8")) == {"b": 1, "a": "ü"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "j.json", "t.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    artifacts.atomic_write_json(path, [1])
    with pytest.raises(ValueError, match="JSON"):
        artifacts.atomic_write_json(path, [float("nan")])
    monkeypatch.setattr(os, "replace", _fail)
    with pytest.raises(OSError, match="killed"):
        artifacts.atomic_write_json(path, [2])
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run"
    for text in ("old", "new"):
        with artifacts.atomic_dir(target) as folder:
            (folder / f"{text}.txt").write_text(text)
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    with pytest.raises(RuntimeError, match="stop"), artifacts.atomic_dir(target) as folder:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("stop")
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]

    real = os.replace

    def fail_second(source: Path, destination: Path) -> None:
        if Path(destination) == target and ".tmp-" in Path(source).name:
            raise OSError("killed")
        real(source, destination)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="killed"), artifacts.atomic_dir(target) as folder:
        (folder / "third.txt").write_text("third")
    assert [p.name for p in target.iterdir()] == ["new.txt"]


def test_a_folder_lost_between_two_renames_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with artifacts.atomic_dir(target) as folder:
        (folder / "old.txt").write_text("old")
    target.rename(tmp_path / ".run.previous")
    with pytest.raises(RuntimeError), artifacts.atomic_dir(target):
        raise RuntimeError("again")
    assert [p.name for p in target.iterdir()] == ["old.txt"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
from editunlearn import artifacts
folder = pathlib.Path(sys.argv[1])
with artifacts.atomic_path(folder / "a [1].bin") as file, artifacts.atomic_dir(folder / "run") as other:
    file.write_bytes(b"half")
    (file.parent / ".tmpGPLiFn").write_bytes(b"of a library")
    (other / "half.txt").write_text("half")
    os.kill(os.getpid(), 9)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
        assert len(list(tmp_path.iterdir())) == 2  # that of the one before is gone
    artifacts.atomic_write_bytes(tmp_path / "a.bin", b"another")
    assert len(list(tmp_path.iterdir())) == 3
    with artifacts.atomic_path(tmp_path / "a [1].bin") as mine:
        mine.write_bytes(b"all")
        artifacts.atomic_write_bytes(tmp_path / "a [1].bin", b"meanwhile")  # one that lives is left alone
    with artifacts.atomic_dir(tmp_path / "run") as folder:
        (folder / "new.txt").write_text("new")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {"a.bin", "a [1].bin", "run", "run/new.txt"} and mine.parent.exists() is False
    assert (tmp_path / "a [1].bin").read_bytes() == b"all"


def test_sha256_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert artifacts.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
