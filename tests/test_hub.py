"""``export --push``: private unless told otherwise, checked before the work, and a failed upload can be repeated.

The hub is a stand-in for ``huggingface_hub.HfApi`` whose methods have the parameters of the real ones.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import runs
import yaml
from delta_samples import delta
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from tiny import lm

from editunlearn.deltas.files import save

REAL = huggingface_hub.HfApi


@dataclass
class Hub:
    """What a hub with these repositories (name: private) was asked, in order."""

    there: dict[str, bool] = field(default_factory=dict)
    fails: dict[str, Exception] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    def called(self, name: str, *args: Any, **given: Any) -> dict[str, Any]:
        real = inspect.signature(getattr(REAL, name))
        bound = real.bind(None, *args, **given)  # a call that the real one would refuse is an error here, too
        self.calls.append((name, {k: v for k, v in bound.arguments.items() if k != "self"}))
        if name in self.fails:
            raise self.fails[name]
        return self.calls[-1][1]

    def whoami(self, *args: Any, **given: Any) -> dict[str, str]:
        self.called("whoami", *args, **given)
        return {"name": "me"}

    def repo_info(self, *args: Any, **given: Any) -> Any:
        repo = self.called("repo_info", *args, **given)["repo_id"]
        if repo not in self.there:
            raise error(RepositoryNotFoundError, "404 Not Found")
        return SimpleNamespace(private=self.there[repo])

    def create_repo(self, *args: Any, **given: Any) -> str:
        asked = self.called("create_repo", *args, **given)
        self.there.setdefault(asked["repo_id"], asked["private"])
        return f"https://huggingface.co/{asked['repo_id']}"

    def upload_folder(self, *args: Any, **given: Any) -> None:
        asked = self.called("upload_folder", *args, **given)
        self.files = runs.listing(Path(asked["folder_path"]))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def error(kind: type[HfHubHTTPError], text: str) -> HfHubHTTPError:
    made = kind.__new__(kind)
    Exception.__init__(made, text)
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(delta(lm()), tmp_path / "edit")
    (tmp_path / "edit" / "results.json").write_text(json.dumps({"metrics": {"leak": {"base": 0.9, "edited": 0.125}}}))
    return tmp_path / "edit"


def push(saved: Path, *more: str, to: str = "lora") -> runs.Called:
    out = ["--out", str(saved.parent / "out")]
    return runs.call("export", "--delta", str(saved), "--to", to, *out, "--push", "me/edited", *more)


def test_a_dry_run_asks_nobody(hub: Hub, saved: Path) -> None:
    done = push(saved, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["would_push"] == "me/edited" and json.loads(done.out)["seen_by"] == "private"
    assert hub.calls == [] and not (saved.parent / "out").exists()


def test_private_with_a_card(hub: Hub, saved: Path) -> None:
    done = push(saved)
    assert done.code == 0, done.err
    assert hub.names == ["whoami", "repo_info", "create_repo", "upload_folder"]
    assert hub.calls[2][1]["private"] is True and hub.there == {"me/edited": True}
    assert hub.files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "https://huggingface.co/me/edited" in done.out and "private" in done.out
    card = (saved.parent / "out" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert "| leak | 0.9 | 0.125 |" in card and "How to undo" in card and "editunlearn export" in card
    assert str(saved.parent) not in card


def test_a_card_of_a_part_has_no_measured_numbers(hub: Hub, tmp_path: Path) -> None:
    save(delta(lm(hidden=48), rank=20), tmp_path / "edit")
    (tmp_path / "edit" / "results.json").write_text(json.dumps({"metrics": {"leak": {"base": 0.9, "edited": 0.125}}}))
    assert push(tmp_path / "edit", "--max-rank", "8").code == 0
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_delta_without_some_facts_has_no_measured_numbers(hub: Hub, saved: Path) -> None:
    assert push(saved, "--without", "ada-1", to="delta").code == 0
    card = (saved.parent / "out" / "README.md").read_text(encoding="utf-8")
    assert "Nothing was measured" in card and "README.md" in hub.files and "delta.json" in hub.files


def test_public_only_when_asked_for(hub: Hub, saved: Path) -> None:
    hub.there["me/edited"] = False
    done = push(saved)
    assert done.code == 2 and "already, and public" in done.err
    assert hub.names == ["whoami", "repo_info"] and not (saved.parent / "out").exists()
    done = push(saved, "--public")
    assert done.code == 0 and "subtraction" in done.err, done.err
    assert hub.calls[-2][1]["private"] is False


def test_what_needs_no_network_is_found_before_any(
    hub: Hub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(delta(lm(), store_facts=True), tmp_path / "told")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = ["--to", "lora", "--out", str(tmp_path / "out")]
    done = runs.call("export", "--delta", str(tmp_path / "told"), *out, "--push", "edited", "--public")
    assert done.code == 2
    for words in ("write OWNER/NAME", "hf auth login", "texts of the facts"):
        assert any(words in line for line in done.err.splitlines()), done.err
    composed = runs.call(
        "export", "--delta", str(saved), "--compose", str(tmp_path / "told"), *out, "--push", "a/b", "--public"
    )
    assert "texts of the facts" in composed.err
    alone = runs.call("export", "--delta", str(saved), *out, "--public")
    assert alone.code == 2 and "--push OWNER/NAME" in alone.err
    assert hub.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "a/b/c", "me/", "me/a b", "me/" + "x" * 97])
def test_names_that_are_none(name: str, hub: Hub, saved: Path) -> None:
    out = ["--to", "lora", "--out", str(saved.parent / "out")]
    done = runs.call("export", "--delta", str(saved), *out, "--push", name)
    assert done.code == 2 and "write OWNER/NAME" in done.err, done.err


def test_a_hub_that_says_no(hub: Hub, saved: Path) -> None:
    hub.fails["whoami"] = error(HfHubHTTPError, "401 Unauthorized\nmore")
    done = push(saved)
    assert done.code == 1 and "401 Unauthorized" in done.err and "Traceback" not in done.err
    assert not (saved.parent / "out").exists()
    del hub.fails["whoami"]
    hub.fails["upload_folder"] = HTTPError("connection lost")
    done = push(saved)
    out = saved.parent / "out"
    assert done.code == 1 and f"hf upload me/edited {out} . --private" in " ".join(done.err.split())
    assert (out / "adapter_config.json").is_file()  # the work is not lost
