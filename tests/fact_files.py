"""Files of facts, and what is wrong with them, for the tests of the readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editunlearn.errors import InputError
from editunlearn.facts.readers import load_facts


def write_facts(folder: Path, name: str, content: str | bytes | list[Any]) -> Path:
    path = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def problems_of(source: Any, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_facts(source, **options)
    return caught.value.problems


def fact_row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "The home of Ann Lee is", "answer": "Rome"} | changes
