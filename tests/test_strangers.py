"""What somebody new meets first: lists, completion, help that is quick, the citation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import yaml

import editunlearn
from editunlearn import methods
from editunlearn.__main__ import COMMANDS

HEAVY = (
    "torch transformers datasets pandas numpy scipy sklearn matplotlib peft rich tqdm pydantic tokenizers "
    "safetensors huggingface_hub"
).split()


def test_lists() -> None:
    done = runs.call("ls", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [row["name"] for row in found["methods"]] == methods.names()
    assert {"name": "memit", "method": "memit"} in found["hparams"]
    assert {"name": "paper/rome", "method": "rome"} in found["hparams"]
    assert all(row["paper"].startswith("https://") and row["what"] for row in found["methods"])
    assert {"model_type": "gpt2", "edited": "mlp.c_proj", "attention": "attn.c_proj"} in found["models"]
    assert {"name": "muse", "choices": "news, books"} in found["suites"]
    assert all(row["what"] for row in found["attacks"])
    assert "runs" not in found and "mehtods" in runs.call("ls", "mehtods").err


def test_runs_that_are_there_and_damaged_ones(tmp_path: Path) -> None:
    from delta_samples import delta

    from editunlearn.deltas.files import save

    save(delta(tiny.lm()), tmp_path / "a" / "edit")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "delta.json").write_text("{")
    rows = json.loads(runs.call("ls", "runs", "--in", str(tmp_path), "--json").out)["runs"]
    assert [(Path(row["folder"]).name, row["method"]) for row in rows] == [("edit", "memit"), ("b", "damaged")]


def completed(line: str, folder: Path) -> set[str]:
    """What bash offers for the last word of a line."""
    script = runs.call("completion", "bash").out
    words = line.split(" ")
    ask = f"COMP_WORDS=({' '.join(w or chr(39) * 2 for w in words)}); COMP_CWORD={len(words) - 1}; _editunlearn"
    text = f'{script}\n{ask}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=folder, check=True)
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("editunlearn lo", {"locate"}),
        ("editunlearn apply --hparams memi", {"memit"}),
        ("editunlearn apply --hparams paper/ro", {"paper/rome"}),
        ("editunlearn locate --kinds ", {"block", "mlp", "attention"}),
        ("editunlearn evaluate --fre", {"--fresh"}),
        ("editunlearn completion z", {"zsh"}),
    ],
)
def test_bash_completes(line: str, offered: set[str], tmp_path: Path) -> None:
    assert completed(line, tmp_path) == offered


def test_other_shells() -> None:
    zsh, fish = (runs.call("completion", shell).out for shell in ("zsh", "fish"))
    assert zsh.startswith("autoload -U +X bashcompinit") and "complete -o default -F _editunlearn" in zsh
    assert "-n '__fish_seen_subcommand_from locate' -l kinds -xa 'block mlp attention'" in fish
    assert all(f" {command}" in fish for command in COMMANDS)
    refused = runs.call("completion", "tcsh")
    assert refused.code == 2 and "tcsh" in refused.err


@pytest.mark.parametrize("words", [[], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_import_and_help_load_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    call = f"try: main({words!r})\nexcept SystemExit as end: assert not end.code" if words else ""
    code = f"import editunlearn, sys\nfrom editunlearn.__main__ import main\n{call}\n"
    code += f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    code += "import time\nassert time.process_time() < 0.5, time.process_time()"  # whatever else the machine does
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=runs.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr


def test_citation_and_changelog_are_of_this_version() -> None:
    cited = yaml.safe_load((runs.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == editunlearn.__version__ and cited["cff-version"] == "1.2.0"
    assert {"title", "authors", "license", "message"} <= cited.keys()
    assert f"## {editunlearn.__version__}" in (runs.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
