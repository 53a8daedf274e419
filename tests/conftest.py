"""What every test runs under: one thread (tiny models are slower on more) and a cache of its own."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start, too; read when torch is imported

import pytest
import tiny


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache, but for those of the demo model, which is slow to convert."""
    if request.node.get_closest_marker("demo") is None:
        monkeypatch.setenv("EDITUNLEARN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small text for second moments: about 700 tokens, more than any tiny model is wide."""
    path = tmp_path_factory.mktemp("text") / "general.txt"
    path.write_text(tiny._TEXT.strip().replace("\n", "\n\n"), encoding="utf-8")
    return str(path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached, and nobody waits to find out."""
    from editunlearn.lm import sources

    monkeypatch.setattr(sources, "hub_unreachable", lambda: True)
