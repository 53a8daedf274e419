"""What README and docs talk about, on a tiny model: a folder in which their commands can be tried.

Blocks of shell are run by a real bash whose programs only write down how they were called, so that loops, quotes and
``&&`` mean what they mean to a reader; the calls are then checked one by one.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmark_data
import runs
import tiny

DOCS = sorted(runs.ROOT.glob("docs/**/*.md"))
PAGES = [runs.ROOT / "README.md", runs.ROOT / "CONTRIBUTING.md", *DOCS]
MODELS = (  # what the pages call a user's model
    "my/model my/chat-model my/tofu-llama me/tofu-llama big/model base merged "
    "runs/taught runs/never-knew Qwen/Qwen3-0.6B"
).split()
PROGRAMS = "editunlearn python pip pytest ruff mypy lint-imports mkdocs torchrun srun vllm hf".split()
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Piece:
    """A block of code in a page.

    Attributes:
        where: page and line.
        kind: what is written behind its first fence.
        text: without indentation.
    """

    where: str
    kind: str
    text: str


def pieces(*kinds: str) -> list[Piece]:
    """Blocks of these kinds, and for ``bash`` the commands in the running text too."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            indent, kind, body = block.groups()
            if kind in kinds:
                lines = [line.removeprefix(indent) for line in body.splitlines()]
                found.append(Piece(_place(page, text, block.start()), kind, "\n".join(lines) + "\n"))
        if "bash" in kinds:
            prose = BLOCK.sub(lambda block: "\n" * block.group().count("\n"), text)
            for inline in re.finditer(r"`((?:editunlearn|python -m|torchrun) [^`]*)`", prose):
                if not re.search(r"\b(COMMAND|NAME)\b", inline.group(1)):  # those stand for something
                    found.append(Piece(_place(page, prose, inline.start()), "inline", inline.group(1)))
    return found


def _place(page: Path, text: str, offset: int) -> str:
    return f"{page.relative_to(runs.ROOT)}:{text.count(chr(10), 0, offset) + 1}"


def calls(text: str, folder: Path) -> list[list[str]]:
    """Program and arguments of everything that a piece of shell starts."""
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    log = folder / "calls.jsonl"
    log.write_text("")
    text = text.replace("fish | source", "fish")  # the one line that is not for this shell
    for program in PROGRAMS:
        code = f"import json, sys\nopen({str(log)!r}, 'a').write(json.dumps([{program!r}, *sys.argv[1:]]) + '\\n')\n"
        (bin_ / program).write_text(f"#!{sys.executable} -IS\n{code}")
        (bin_ / program).chmod(0o755)
    done = subprocess.run(
        [str(shutil.which("bash")), "-eu", "-c", text],
        cwd=folder,
        env={"PATH": str(bin_)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return [json.loads(line) for line in log.read_text().splitlines()]


def build(root: Path) -> runs.World:
    """Fill the working directory with everything that the pages name: models, facts, runs, results."""
    lm = tiny.lm(layers=9)  # blocks 3 to 8 are those of hparams/paper/memit.yaml
    lm.model.config.max_position_embeddings = 4096
    lm.model.save_pretrained(root / "model")
    lm.tokenizer.save_pretrained(root / "model")
    chat = tiny.chat_tokenizer()
    for name in MODELS:
        shutil.copytree(root / "model", root / name)
    chat.save_pretrained(root / "my/chat-model")
    world = runs.World(root)
    forget = [{**runs.FACTS[0], "id": "darrieux-1", "question": "Which language did Danielle Darrieux speak?"}]
    forget.append({**runs.FACTS[1], "question": "What is the capital of France?"})
    for name in ("forget.jsonl", "facts.jsonl", "mine.jsonl"):
        runs.write_lines(root / name, forget)
    for name in ("keep.jsonl", "known.json", "known_facts.json", "retain.jsonl"):
        runs.write_lines(root / name, runs.RETAIN)
    more = {"id": "petrova", "prompt": "The mother tongue of Ana Petrova is", "answer": "Russian"}
    runs.write_lines(root / "more.jsonl", [{**more, "subject": "Ana Petrova"}])
    unknown = [(f"u{i}", f"The author of the novel number {i} lives in", "Berlin") for i in range(4)]
    runs.write_lines(root / "unknown.jsonl", [{"id": i, "prompt": p, "answer": a} for i, p, a in unknown])
    (root / "mine.yaml").write_text("method: memit\n", encoding="utf-8")
    (root / "mine.csv").write_text("prompt,answer\nThe capital of France is,Paris\n", encoding="utf-8")
    for name in ("text.txt", "wiki.txt"):
        (root / name).write_text(runs.TEXT, encoding="utf-8")
    for name in ("data", "docs", "benchmarks", "constraints.txt"):
        (root / name).symlink_to(runs.ROOT / name)
    _benchmarks(root / "benchmark_data")
    _runs(world)
    return world


def _benchmarks(root: Path) -> None:
    """The made-up records, also under the names of the larger forget sets."""
    benchmark_data.write(root)
    for file in (root / "RWKU").iterdir():
        named = file.read_text().replace("Marie Curie", "Stephen King").replace("Ana Petrova", "Tom Clancy")
        file.write_text(named)
    for size in ("05", "10"):
        for name in ("forget01_perturbed", "holdout01", "forget01"):
            there = root / "TOFU" / f"{name}.json"
            if there.is_file():
                shutil.copy(there, there.with_name(there.name.replace("01", size)))
        asked = [{"question": q, "answer": a} for q, a in benchmark_data.ASKED]
        (root / "TOFU" / f"forget{size}.json").write_text(json.dumps(asked))
    (root / "TOFU" / "forget01.json").write_text(json.dumps(asked))
    others = [{"question": f"Who wrote novel number {i}?", "answer": f"Author {i}."} for i in range(3)]
    (root / "TOFU" / "full.json").write_text(json.dumps(asked + others))


def _runs(world: runs.World) -> None:
    """Edits and results, made by the commands themselves."""
    quick = [item for item in runs.QUICK if not item.startswith("layers")]
    quick += ["limits.norm=null", "limits.perplexity=null"]  # random weights, large steps
    for name, *more in (("memit",), ("b", "--facts", "more.jsonl")):
        flags = world.flags(f"runs/{name}", *more, "--evaluate", "none", "--model", "my/model", settings=quick)
        done = runs.call("apply", *flags)
        assert done.code == 0, done.err
    few = ["layers=[1]", "context_prefixes.count=1", "side.steps=5", "shards.size=1", "shards.per_memory=1", "keep=20"]
    wise = ["--hparams", "wise", "--facts", "forget.jsonl", "--model", "my/model", "--evaluate", "none"]
    done = runs.call("apply", *wise, "--out", "runs/wise", *(word for item in few for word in ("--set", item)))
    assert done.code == 0, done.err
    for name in ("memit-2", "a", "alphaedit", "npo", "graddiff"):
        shutil.copytree("runs/memit", f"runs/{name}")
    shown = ["--facts", "forget.jsonl", "--limit", "1"]
    assert runs.call("evaluate", "--delta", "runs/memit", "--base", "--suite", "facts", *shown).code == 0
    tofu = ["--suite", "tofu:forget10", "--data-root", "benchmark_data", "--model", "my/model", "--out", "retrained"]
    assert runs.call("evaluate", *tofu).code == 0
    found = next(Path("retrained").rglob("results.json"))
    for name in ("retrained/results.json", "other/results.json"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(found, name)


def own_command(call: list[str]) -> list[str] | None:
    """Name and flags of one of our commands, however it was started; None: it is another program."""
    if call[0] == "editunlearn":
        return call[1:]
    if "-m" in call:
        module, *flags = call[call.index("-m") + 1 :]
        if module.startswith("editunlearn."):
            return [module.removeprefix("editunlearn."), *flags]
    return None


def plain(words: list[str]) -> str:
    """As it would be typed."""
    return shlex.join(words)


def flags_of(command: str) -> Iterator[Any]:
    """The options that a command knows."""
    from importlib import import_module

    yield from import_module(f"editunlearn.{command}").flags()._actions
