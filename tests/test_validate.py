"""``validate`` finds every planted mistake and lets sound files pass, without reading weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import yaml
from safetensors.torch import load_file, save_file

from editunlearn.deltas.manifest import VERSION

HPARAMS: dict[str, Any] = {"method": "memit", "layers": [0], "moments": {"text": "general", "length": 32}}
HPARAMS["refine"] = {"text_length": 32}
FACT = {"id": "a", "subject": "France", "prompt": "The capital of France is", "answer": "Paris"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[runs.World]:
    made = runs.build(tmp_path_factory.mktemp("validate") / "world")
    done = runs.call("apply", *made.flags(made.root / "edit", "--evaluate", "none"))
    assert done.code == 0, done.err
    yield made


class Planted:
    """A folder with sound files, in which one mistake is made; each method returns the flags of ``validate``."""

    def __init__(self, folder: Path, world: runs.World) -> None:
        self.folder, self.world = folder, world

    def hparams(self, **changes: Any) -> list[str]:
        path = self.folder / "mine.yaml"
        path.write_text(yaml.safe_dump({**HPARAMS, **changes}))
        return [str(path), "--model", str(self.world.model)]

    def text(self, name: str, content: str) -> list[str]:
        (self.folder / name).write_text(content, encoding="utf-8")
        return [str(self.folder / name)]

    def facts(self, *rows: dict[str, Any]) -> list[str]:
        return [str(runs.write_lines(self.folder / "facts.jsonl", list(rows)))]

    def delta(self, change: Callable[[Path], None]) -> list[str]:
        shutil.copytree(self.world.root / "edit", self.folder / "edit")
        change(self.folder / "edit")
        return [str(self.folder / "edit")]

    def model(self, change: Callable[[Path], None]) -> list[str]:
        shutil.copytree(self.world.model, self.folder / "model")
        change(self.folder / "model")
        return [str(self.folder / "model")]


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in FACT.items() if k != key}


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "delta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def not_finite(folder: Path) -> None:
    """A delta whose two files agree, with a factor that is not a number."""
    from editunlearn.artifacts import sha256_file

    path = folder / "delta.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "editunlearn.delta", "version": str(VERSION)})
    manifest(tensors_sha256=sha256_file(path))(folder)


def other_weights(planted: Planted) -> list[str]:
    def change(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
        save_file(tensors, path, metadata={"format": "pt"})

    return [*planted.delta(lambda _: None), "--model", *planted.model(change)]


MISTAKES: dict[str, tuple[Callable[[Planted], list[str]], str]] = {
    # hparams
    "unknown key": (lambda p: p.hparams(value={"clampp": 1}), "Did you mean 'value.clamp'?"),
    "wrong type": (lambda p: p.hparams(value={"steps": "many"}), "value.steps"),
    "out of range": (lambda p: p.hparams(ridge=-1), "ridge"),
    "unknown method": (lambda p: p.hparams(method="memmit"), "Did you mean 'memit'?"),
    "layer that is not there": (lambda p: p.hparams(layers=[7]), "block 7 does not exist"),
    "layers of two kinds": (lambda p: p.hparams(layers=[1, 0.5]), "not both in one list"),
    "layer twice": (lambda p: p.hparams(layers=[1, 1]), "in ascending order, each once"),
    "no text": (lambda p: p.hparams(moments={"text": "nowhere.txt"}), "nowhere.txt"),
    "windows too long": (lambda p: p.hparams(moments={"length": 9999}), "moments.length is 9999"),
    "chunks and merge": (lambda p: p.hparams(merge={"by": "all"}, chunks={}), "do not go together"),
    "broken YAML": (lambda p: p.text("a.yaml", "method: [memit\n"), "a.yaml"),
    "setting without value": (lambda p: [*p.hparams(), "--set", "ridge"], "ridge"),
    # facts
    "no answer": (lambda p: p.facts(FACT, {**without("answer"), "id": "b"}), "facts.jsonl:2"),
    "no prompt": (lambda p: p.facts(without("prompt")), "facts.jsonl:1"),
    "subject elsewhere": (lambda p: p.facts({**FACT, "subject": "Japan"}), 'subject "Japan" is not in the prompt'),
    "id twice": (lambda p: p.facts(FACT, {**FACT, "prompt": "France's capital:"}), 'id "a"'),
    "contradiction": (lambda p: p.facts(FACT, {**FACT, "id": "b", "answer": "Rome"}), "contradicts"),
    "two targets": (
        lambda p: p.facts({**FACT, "target": "No."}, {**FACT, "id": "b", "target": "Yes."}),
        'target "Yes." contradicts',
    ),
    "broken JSON": (lambda p: p.text("f.jsonl", json.dumps(FACT) + '\n{"prompt": "x\n'), "f.jsonl:2: not valid JSON"),
    "empty file": (lambda p: p.text("f.jsonl", ""), "f.jsonl"),
    "neighbors of another shape": (lambda p: p.facts({**FACT, "neighbors": "Rome"}), "facts.jsonl:1"),
    "subject marked twice": (lambda p: p.facts({**FACT, "prompt": "{} and {} is"}), "mark the subject's place once"),
    "kept and forgotten": (
        lambda p: [*p.facts(FACT), "--retain", *p.text("keep.jsonl", json.dumps({**FACT, "id": "k"}))],
        '"k" is to be kept, "a" to be forgotten',
    ),
    "misspelt name": (lambda p: [p.facts(FACT)[0].replace("facts", "fatcs")], "Did you mean 'facts.jsonl'?"),
    # deltas
    "factors cut off": (lambda p: p.delta(cut("delta.safetensors")), "do not belong together"),
    "factors missing": (lambda p: p.delta(lambda f: (f / "delta.safetensors").unlink()), "does not exist"),
    "manifest missing": (lambda p: p.delta(lambda f: (f / "delta.json").unlink()), "neither a delta"),
    "manifest cut off": (lambda p: p.delta(cut("delta.json")), "delta.json"),
    "manifest of later times": (lambda p: p.delta(manifest(version=99)), "99"),
    "not a number": (lambda p: p.delta(not_finite), "not finite"),
    "other weights": (other_weights, "model.layers.0.mlp.down_proj"),
    # models
    "no decoder": (lambda p: p.model(config(model_type="bert")), "is an encoder"),
    "routed experts alone": (
        lambda p: p.model(config(model_type="mixtral", num_local_experts=4)),
        "mixture of experts",
    ),
    "no weights": (lambda p: p.model(lambda f: [x.unlink() for x in f.glob("*.safetensors")]), "no weights"),  # type: ignore[func-returns-value]
    "weights cut off": (lambda p: p.model(cut("model.safetensors")), "model.safetensors"),
    "broken config": (lambda p: p.model(cut("config.json")), "config.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_planted_mistake_is_found(
    name: str, world: runs.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editunlearn.lm.loading._weights", lambda *_: pytest.fail("weights were loaded"))
    plant, words = MISTAKES[name]
    done = runs.call("validate", *plant(Planted(tmp_path, world)))
    assert done.code == 2 and words in done.err, done.err
    assert done.out == "" and "Traceback" not in done.err


def test_there_are_at_least_thirty() -> None:
    assert len(MISTAKES) >= 30


def test_sound_files_pass(world: runs.World, tmp_path: Path) -> None:
    planted = Planted(tmp_path, world)
    mine, _, model = planted.hparams()
    keep = str(world.root / "retain.jsonl")
    flags = [mine, "memit.yaml", str(world.root / "facts.jsonl"), str(world.root / "edit"), model]
    done = runs.call("validate", *flags, "--retain", keep, "--model", model, "--set", "moments.length=32",
                     "--set", "refine.text_length=32", "--set", "layers=[0]", "--json")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [one["what"] for one in found] == ["hparams", "hparams", "facts", "delta", "model", "facts", "model"]
    assert found[2]["found"] == "2 facts" and "memit, 2 facts, for" in found[3]["found"]


def test_all_mistakes_are_in_one_report(world: runs.World, tmp_path: Path) -> None:
    planted = Planted(tmp_path, world)
    paths = [planted.hparams(ridge=-1)[0], *planted.facts(without("answer")), *planted.delta(cut("delta.json"))]
    done = runs.call("validate", *paths, "nowhere.yaml")
    assert done.code == 2
    for words in ("ridge", "facts.jsonl:1", "delta.json", "nowhere.yaml"):
        assert any(words in line for line in done.err.splitlines())
    assert runs.call("validate").code == 2
