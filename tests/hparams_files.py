"""Files of settings, and what is wrong with them, for the tests of the loader."""

from __future__ import annotations

from pathlib import Path

import pytest

from editunlearn.errors import InputError
from editunlearn.hparams import load_hparams


def write(tmp_path: Path, text: str, name: str = "own.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(source: object, **options: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_hparams(source, **options)  # type: ignore[arg-type]
    return caught.value.problems


def problem(source: object, **options: object) -> str:
    found = problems(source, **options)
    assert len(found) == 1, found
    return found[0]
