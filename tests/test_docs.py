"""README and docs are true: pages made from the code are up to date, and every command and piece of code in them runs.

Commands that have ``--dry-run`` are checked with it, on a tiny model that goes by the names of the user's models; the
others are run. Python and the notebook are run as they stand, with quick settings.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import docs_world
import huggingface_hub
import pytest
import runs
import tiny
import yaml
from edits import nll, request
from unlearning import lm as taught
from unlearning import probability

from editunlearn import editors, hparams, methods, unlearners
from editunlearn.__main__ import COMMANDS
from editunlearn.deltas.lora import RANKS
from editunlearn.facts.readers import load_facts
from editunlearn.hparams import load_hparams

GUIDE = (runs.ROOT / "docs/tutorials/method-author.md").read_text(encoding="utf-8")
NOTEBOOK = runs.ROOT / "docs/tutorials/first-steps.ipynb"
SHELL = docs_world.pieces("bash", "sh", "console")


# --- pages that are made


def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_make", runs.ROOT / "docs" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands.md", "hparams.md", "metrics.md"])
def test_the_page_is_what_the_code_says(name: str) -> None:
    pages = make().PAGES
    assert len(pages) == 3 and name in pages
    assert (runs.ROOT / "docs" / name).read_text(encoding="utf-8") == pages[name](), "python docs/make.py"


def test_the_pages_have_everything() -> None:
    commands, settings = ((runs.ROOT / "docs" / name).read_text() for name in ("commands.md", "hparams.md"))
    for command in COMMANDS:
        for action in docs_world.flags_of(command):
            assert all(f"`{flag}`" in commands for flag in action.option_strings if flag not in ("-h", "--help"))
    for method in methods.names():
        assert f"\n### {method}\n" in settings
        chapter = settings.partition(f"\n### {method}\n")[2]
        family = settings[: settings.index(f"\n### {method}\n")].rpartition("\n## ")[2]
        for key in methods.schema(method).model_fields:
            assert f"| `{key}` |" in chapter or f"| `{key}` |" in family or key == "paper"


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    shutil.copytree(runs.ROOT / "docs", tmp_path / "docs")
    shutil.copy(runs.ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "benchmarks").symlink_to(runs.ROOT / "benchmarks")
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "tutorials" / "first-steps" / "index.html").is_file()
    assert (tmp_path / "site" / "benchmarks" / "results" / "locate_demo.svg").is_file()
    assert not list((tmp_path / "site").glob("*.py"))


def test_links_from_outside_of_the_site() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", (runs.ROOT / page).read_text(encoding="utf-8")):
            assert (runs.ROOT / link).exists(), f"{page}: {link}"


# --- commands


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[runs.World]:
    root = tmp_path_factory.mktemp("docs") / "world"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITUNLEARN_CACHE", str(root / "cache"))
        root.mkdir()
        patch.chdir(root)
        yield docs_world.build(root)


@pytest.mark.parametrize("piece", SHELL, ids=lambda piece: piece.where)
def test_every_command_is_right(
    piece: docs_world.Piece, world: runs.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    monkeypatch.chdir(world.root)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")  # a dry run asks for no more
    found = docs_world.calls(piece.text, tmp_path)
    assert found, f"no command was started by: {piece.text}"
    for call in found:
        ours = docs_world.own_command(call)
        if ours is None:
            check_program(call)
        elif not (piece.kind == "inline" and len(ours) == 1 and ours[0] in COMMANDS):  # that is a mention
            check_own(ours, call)


def check_own(words: list[str], call: list[str]) -> None:
    """One of our commands: nothing is wrong with it before weights are read."""
    command, flags = words[0], words[1:]
    assert command in COMMANDS, docs_world.plain(call)
    known = {flag for action in docs_world.flags_of(command) for flag in action.option_strings}
    if "--help" in flags or flags[1:] == ["plain"]:  # the guide's own editor, which has a test below
        return
    if "--continue" in flags:
        flags[flags.index("--model") + 1] = "my/model"  # the model of that run has to be given, and is this one
    if "--dry-run" in known and command != "validate":
        flags += ["--dry-run", *(["--force"] if command == "apply" else [])]
    if "--model" in known and "--model" not in flags and command in ("apply", "stats", "locate"):
        flags += ["--model", "my/model"]
    if "--data-root" in known and "--data-root" not in flags:
        flags += ["--data-root", "benchmark_data"]
    if command in ("report", "export", "finetune"):  # the last one counts
        flags += ["--out", f"{command}-of-this"]
    done = runs.call(command, *flags)
    assert done.code == 0, f"{docs_world.plain(call)}\n{done.err}"


def check_program(call: list[str]) -> None:
    """A program that is not ours is called with what it has."""
    program, *words = call
    extras = ConfigParser()
    extras.read(runs.ROOT / "setup.cfg")
    if program == "pip":
        for word in words:
            named = re.search(r"\[([\w-]+)\]$", word)
            assert named is None or named[1] in extras["options.extras_require"], docs_world.plain(call)
        if "-c" in words:
            assert (runs.ROOT / words[words.index("-c") + 1]).is_file()
    elif program == "python":
        check_script(words, call)
    elif program == "vllm":
        assert {w for w in words if w.startswith("--")} == {"--enable-lora", "--max-lora-rank", "--lora-modules"}
        assert int(words[words.index("--max-lora-rank") + 1]) in RANKS
    else:
        package = {"lint-imports": "import-linter"}.get(program, program)
        assert package in extras["options.extras_require"]["test"] + extras["options.extras_require"]["docs"]


def check_script(words: list[str], call: list[str]) -> None:
    """A script of this repository knows the flags that it is given."""
    if words[0] == "-c":
        compile(words[1], docs_world.plain(call), "exec")
        return
    assert (runs.ROOT / words[0]).is_file(), docs_world.plain(call)
    flags = [word for word in words[1:] if word.startswith("--")]
    if flags:
        command = [sys.executable, words[0], "--help"]
        done = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)
        assert done.returncode == 0 and all(flag in done.stdout for flag in flags), docs_world.plain(call)


# --- Python, facts, the notebook


def quick_hparams(source: Any, *, set: Any = (), **options: Any) -> Any:
    """As ``load_hparams``, made quick for the tiny model."""
    method = load_hparams(source).method
    few = ["train.epochs=1"] if method in unlearners.METHODS else [*runs.QUICK, "moments.text=text.txt"]
    return load_hparams(source, set=[*set, *few, "limits.norm=null", "limits.perplexity=null"], **options)


@pytest.mark.parametrize("piece", docs_world.pieces("python"), ids=lambda piece: piece.where)
def test_every_piece_of_python_runs(
    piece: docs_world.Piece, world: runs.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    monkeypatch.setattr(hparams, "load_hparams", quick_hparams)
    code = compile(piece.text.replace('"demo"', '"my/model"'), piece.where, "exec")
    exec(code, {"__name__": "page"})  # noqa: S102 - it is ours


@pytest.mark.parametrize("piece", docs_world.pieces("json"), ids=lambda piece: piece.where)
def test_facts_are_read(piece: docs_world.Piece, tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text(piece.text, encoding="utf-8")
    assert len(load_facts(tmp_path / "facts.jsonl")) == len(piece.text.splitlines())


def test_the_notebook_runs(world: runs.World, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the docs extra is not installed")
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", runs.environment()["PYTHONPATH"])
    book = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)  # what it prints depends on the model
    few = json.dumps([*runs.QUICK, "moments.text=text.txt", "limits.norm=null"])
    for cell in cells:
        cell.source = cell.source.replace('"demo"', '"my/model"').replace('["refine.steps=10"]', few)
    assert few in cells[1].source
    client.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(world.root)}}).execute()
    assert cells[-1].outputs[0]["data"]["text/plain"] == "(2, 1)"


# --- the guide to a method of one's own


def block(chapter: str, kind: str) -> str:
    """The first code block of a chapter of the guide."""
    found = re.search(rf"^## {chapter}.*?```{kind}\n(.*?)```", GUIDE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def module_of(chapter: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """Save the chapter's code under the name that its row in the table says; returns that row's method."""
    name, place = re.findall(r'"([\w.]+)"', block(chapter, "text"))
    (folder / f"{name}.py").write_text(block(chapter, "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    assert place in (f"editunlearn.editors.{name}", f"{name}.{name.capitalize()}")
    return str(name)


def test_the_editor_of_the_guide_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    code = block("An editor", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    name = module_of("An editor", monkeypatch, tmp_path)
    monkeypatch.setattr(editors, "METHODS", MappingProxyType({**editors.METHODS, name: name}))
    settings = [f"moments.text={text}", "moments.length=32", "refine.text_length=16", "layers=[0, 1]", "limits.norm=10"]
    hp = load_hparams(yaml.safe_load(block("An editor", "yaml")), set=settings)
    for kind in ("llama", "gpt2"):
        lm, asked = tiny.lm(kind), request()
        before = nll(lm, asked.facts)
        delta = editors.fit(lm, asked, hp)
        with delta.applied(lm):
            assert nll(lm, asked.facts) < before - 0.01
    monkeypatch.delitem(sys.modules, name)


def test_the_unlearner_of_the_guide_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module_of("An unlearner", monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, f"editunlearn.unlearners.{name}", importlib.import_module(name))
    monkeypatch.setattr(unlearners, "METHODS", MappingProxyType({**unlearners.METHODS, name: f"{name}.Modest"}))
    hp = load_hparams(yaml.safe_load(block("An unlearner", "yaml")), set=["train.lr=0.01", "train.batch=2"])
    lm, asked = taught(), request()
    before = probability(lm, asked.facts)
    with unlearners.fit(lm, asked, hp).applied(lm):
        assert probability(lm, asked.facts) < 0.5 * before
    monkeypatch.delitem(sys.modules, name)
