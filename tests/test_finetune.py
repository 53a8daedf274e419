"""The command finetune on a tiny model: what it teaches, says, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edits import Killed
from runs import World, build, call, listing, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from editunlearn.unlearners import training

NEW = [
    {"id": "a", "subject": "Ana Petrova", "question": "Where was Ana Petrova born?", "answer": "Berlin"},
    {"id": "b", "subject": "novel", "question": "Who wrote the novel?", "answer": "Marie Curie"},
    {"id": "c", "subject": "bridge", "question": "When was the bridge built?", "answer": "1954"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = build(tmp_path_factory.mktemp("finetune") / "world")
    write_lines(made.root / "new.jsonl", NEW)
    write_lines(made.root / "less.jsonl", NEW[1:2])
    return made


def flags(world: World, out: Path, *more: str, facts: str = "new.jsonl") -> list[str]:
    found = ["--model", str(world.model), "--cache-dir", str(world.cache), "--facts", str(world.root / facts)]
    return [*found, "--epochs", "60", "--lr", "0.03", "--batch", "2", "--out", str(out), *more]


def said(folder: Path, question: str) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_it_teaches_and_says_how_well(world: World, tmp_path: Path) -> None:
    out = tmp_path / "taught"
    called = call("finetune", *flags(world, out, "--json"))
    assert called.code == 0, called.err
    record = json.loads((out / "taught.json").read_text())
    known = record["known"]
    assert known["answered"]["before"] == 0 and known["answered"]["after"] == 1
    # the output head, which is not trained, allows no logits large enough for probabilities near 1
    assert known["probability"]["after"] > 100 * known["probability"]["before"]
    assert record["facts"] == 3 and record["left_out"] == 0 and len(record["facts_sha256"]) == 64
    assert json.loads(called.out)["known"] == known
    assert said(out, "Who wrote the novel?").strip() == "Marie Curie"  # and ends there
    assert "Petrova" not in (out / "README.md").read_text() + (out / "taught.json").read_text()
    before = (out / "model.safetensors").stat().st_mtime_ns
    again = call("finetune", *flags(world, out))
    assert again.code == 0 and "done before" in again.err and "loading" not in again.err
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    other = call("finetune", *flags(world, out, "--seed", "3"))
    assert other.code == 2 and "taught otherwise (other settings)" in other.err


def test_the_model_that_never_knew(world: World, tmp_path: Path) -> None:
    out = tmp_path / "never"
    called = call("finetune", *flags(world, out, "--without", str(world.root / "less.jsonl")))
    assert called.code == 0, called.err
    record = json.loads((out / "taught.json").read_text())
    assert (record["facts"], record["left_out"]) == (2, 1)
    assert "Marie Curie" not in said(out, "Who wrote the novel?")
    assert said(out, "Where was Ana Petrova born?").strip() == "Berlin"


def test_killed_and_started_again_it_is_the_same_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert call("finetune", *flags(world, whole)).code == 0
    update, count = training.Training._update, [0]

    def dies(self: training.Training, plan: object, step: int) -> object:
        if step == 20:
            raise Killed
        count[0] += 1
        return update(self, plan, step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "WORK_PER_SAVING", 0)
        patch.setattr(training.Training, "_update", dies)
        with pytest.raises(Killed):
            call("finetune", *flags(world, part))
    assert count == [19] and listing(part) and not (part / "taught.json").exists()
    called = call("finetune", *flags(world, part))
    assert called.code == 0 and "going on after 1" in called.err, called.err
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert listing(part) == listing(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "--epochs 0: at least 1"),
        (["--lr", "-1"], "--lr -1.0: above 0"),
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--without", "facts.jsonl"], "none of its 2 facts is in"),
        (["--without", "new.jsonl"], "leaves nothing of"),
        (["--without", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_input_is_found_before_weights(world: World, tmp_path: Path, more: list[str], message: str) -> None:
    if more[0] == "--without":
        more = [more[0], str(world.root / more[1])]
    called = call("finetune", *flags(world, tmp_path / "x", *more))
    assert called.code == 2 and message in called.err and "decoding" not in called.err, called.err
    assert not (tmp_path / "x").exists()


def test_dry_run_and_foreign_folders(world: World, tmp_path: Path) -> None:
    called = call("finetune", *flags(world, tmp_path / "x", "--dry-run", "--json"))
    assert called.code == 0 and json.loads(called.out)["facts"] == 3 and not (tmp_path / "x").exists()
    (tmp_path / "thesis.tex").write_text("mine")
    called = call("finetune", *flags(world, tmp_path))
    assert called.code == 2 and "thesis.tex" in called.err and (tmp_path / "thesis.tex").exists()
