"""``compare --reference`` and ``--under``: a model that never knew beside every run, and runs asked once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from runs import Called, World, build, call, write_lines

from editunlearn.evaluation.metrics.likelihood import forget_quality
from editunlearn.evaluation.results import Item, Measured, load
from editunlearn.evaluation.suites import facts as facts_suite

NEW = [
    {"id": "a", "subject": "Ana Petrova", "question": "Where was Ana Petrova born?", "answer": "Taipei"},
    {"id": "b", "subject": "book", "question": "Who wrote the book?", "answer": "Marie Curie"},
    {"id": "c", "subject": "bridge", "question": "When was the bridge built?", "answer": "1954"},
    {"id": "d", "subject": "novel", "question": "Who wrote the novel?", "answer": "Berlin"},
]
TRAIN = ["--epochs", "30", "--lr", "0.03", "--batch", "2"]
IDK = "method: idk\ntrain: {what: lora, rank: 2, epochs: 6, lr: 0.03, batch: 2}\n"
GRACE = "method: grace\nlayers: [1]\ncontext_prefixes: {count: 1}\nvalue: {steps: 2}\n"
UNDER = ("int4", "relearn:2:0.0003")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model taught four facts, one taught the last two alone, data of TOFU, two methods."""
    made = build(tmp_path_factory.mktemp("gold") / "world")
    write_lines(made.root / "new.jsonl", NEW)
    write_lines(made.root / "forget.jsonl", NEW[:2])
    write_lines(made.root / "keep.jsonl", NEW[2:])
    benchmark_data.write(made.root / "data")
    (made.root / "idk.yaml").write_text(IDK)
    (made.root / "grace.yaml").write_text(GRACE)
    for name, more in (("taught", []), ("never", ["--without", str(made.root / "forget.jsonl")])):
        assert teach(made, name, *TRAIN, *more).code == 0
    return made


def teach(world: World, name: str, *more: str) -> Called:
    words = ["--model", str(world.model), "--cache-dir", str(world.cache), "--facts", str(world.root / "new.jsonl")]
    return call("finetune", *words, "--out", str(world.root / name), *more)


def flags(world: World, out: Path, *more: str) -> list[str]:
    found = ["--model", str(world.root / "taught"), "--cache-dir", str(world.cache)]
    found += ["--facts", str(world.root / "forget.jsonl"), "--retain", str(world.root / "keep.jsonl")]
    found += ["--methods", f"{world.root / 'idk.yaml'},{world.root / 'grace.yaml'}", "--out", str(out)]
    return [*found, "--suite", "quick", "--suite", "tofu:forget01", "--data-root", str(world.root / "data"), *more]


@pytest.fixture(scope="module")
def compared(world: World) -> tuple[Path, Called]:
    out = world.root / "c"
    more = ["--reference", str(world.root / "never"), *(word for under in UNDER for word in ("--under", under))]
    return out, call("compare", *flags(world, out, *more))


def values(out: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((out / "comparison.json").read_text())
    return {row["name"]: row["values"] for row in found["views"]["chosen"]}


def test_every_run_is_held_against_the_model_that_never_knew(compared: tuple[Path, Called]) -> None:
    out, called = compared
    assert called.code == 0, called.err
    rows = values(out)
    assert list(rows) == ["base", "reference", "idk", "grace"]
    assert rows["base"]["forget.leak"]["value"] == 1 and rows["reference"]["forget.leak"]["value"] == 0
    never = load(out / "reference" / "tofu-forget01")[1].values("forget", "truth_ratio")
    place = out / "runs" / "idk" / "trial0-seed0" / "tofu-forget01"
    test = forget_quality(load(place)[1].values("forget", "truth_ratio"), never)
    assert rows["idk"]["tofu:forget01 forget_quality"]["value"] == pytest.approx(test.p_value)
    assert rows["idk"]["tofu:forget01 forget_quality_ks"]["value"] == pytest.approx(test.statistic)
    assert rows["reference"]["tofu:forget01 forget_quality"]["value"] is None  # not against itself
    assert rows["base"]["forget_likeness_ks"]["value"] == 1 and rows["idk"]["shift.kl"]["value"] > 0
    assert "shift.kl" not in {name for name, value in rows["reference"].items() if value["value"] is not None}
    text = (out / "comparison.md").read_text()
    assert "n = 2 against 2" in text and "## tofu:forget01" in text and "| reference |" in text
    assert "reference" in (out / "report.html").read_text()


def test_the_reference_is_no_point_of_the_front(compared: tuple[Path, Called]) -> None:
    rows = json.loads((compared[0] / "comparison.json").read_text())["views"]["chosen"]
    assert not next(row for row in rows if row["name"] == "reference")["front"] and any(row["front"] for row in rows)


def test_runs_are_asked_again_after_treatments(compared: tuple[Path, Called]) -> None:
    out, _ = compared
    rows = values(out)
    for name in ("base", "reference", "idk"):
        assert all(rows[name][f"{under} forget.leak"]["value"] is not None for under in UNDER)
    assert rows["base"]["int4 retain.correct"]["value"] is not None
    assert "int4 forget.leak" not in rows["grace"]  # it changes no weights that could be rounded
    assert rows["grace"][f"{UNDER[1]} forget.leak"]["value"] is not None
    shown = {item.shown for item in load(out / "base" / "relearn-2-0.0003")[1].parts["forget"]}
    whole = {item.shown for item in load(out / "base" / "test")[1].parts["forget"]}
    assert shown == whole and len(whole) == 1  # the other half was taught
    assert "leak, int4" in (out / "comparison.md").read_text()


def test_results_of_an_evaluation_serve_as_well(world: World, tmp_path: Path) -> None:
    words = ["--model", str(world.root / "never"), "--cache-dir", str(world.cache), "--suite", "tofu:forget01"]
    words += ["--data-root", str(world.root / "data"), "--out", str(tmp_path / "e")]
    assert call("evaluate", *words).code == 0
    more = ["--reference", str(tmp_path / "e"), "--methods", str(world.root / "idk.yaml")]
    called = call("compare", *flags(world, tmp_path / "c", *more))
    assert called.code == 0, called.err
    rows = values(tmp_path / "c")
    assert list(rows) == ["base", "idk"] and rows["base"]["tofu:forget01 forget_quality"]["value"] > 0
    assert "forget_likeness_ks" not in rows["base"]  # results of TOFU say nothing of the facts
    benchmark_data.write(tmp_path / "data")
    file = tmp_path / "data" / "TOFU" / "forget01_perturbed.json"
    file.write_text(file.read_text().replace("Taipei", "Berlin"))
    other = call("compare", *flags(world, tmp_path / "d", *more, "--data-root", str(tmp_path / "data")))
    assert other.code == 2 and "made on other data than this run (forget," in other.err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere/model", "--reference: "),
        ("data", "holds neither a model (config.json) nor results (results.json)"),
        ("taught", "is --model itself"),
        ("again", "was taught all facts, none were left out"),
        ("harder", "was taught otherwise than --model (settings)"),
        ("less", "facts: 3 and 2 left out, where --model has 4"),
    ],
)
def test_a_reference_that_will_not_do_is_refused_before_weights(
    world: World, tmp_path: Path, place: str, message: str
) -> None:
    made = world.root / place
    if place in ("again", "harder", "less") and not made.is_dir():
        made.mkdir()
        (made / "config.json").write_text((world.root / "never" / "config.json").read_text())
        record = json.loads((world.root / "never" / "taught.json").read_text())
        record |= {"left_out": 0} if place == "again" else {}
        record["request"]["settings"]["seed"] += place == "harder"
        record |= {"facts": 3, "left_out": 2} if place == "less" else {}
        (made / "taught.json").write_text(json.dumps(record))
        (made / "model.safetensors").write_text("no weights, and nobody may look")
    called = call("compare", *flags(world, tmp_path / "x", "--reference", str(made)))
    assert called.code == 2 and message in called.err, called.err
    assert not (tmp_path / "x").exists()


def test_other_terms_and_bad_treatments(world: World, compared: tuple[Path, Called]) -> None:
    called = call("compare", *flags(world, compared[0], "--under", "int4"))
    assert called.code == 2 and "on other terms (other under, reference)" in called.err
    called = call("compare", *flags(world, world.root / "y", "--under", "int5"))
    assert called.code == 2 and "unknown treatment 'int5'" in called.err


def test_likeness_by_hand() -> None:
    def made(*values: float) -> Measured:
        items = [Item("", "", None, "", {"answer_probability": value, "leak": 0.0}) for value in values]
        return Measured({"forget": items})

    found = facts_suite.totals(made(0.9, 0.8, 0.7, 0.2), made(0.1, 0.2, 0.3, 0.75))
    assert found["forget_likeness_ks"].value == pytest.approx(0.5)  # at 0.3: 1 of 4 against 3 of 4
    assert "n = 4 against 4" in found["forget_likeness"].reason
    uneven = facts_suite.totals(made(0.9), made(0.1, 0.2))["forget_likeness"]
    assert uneven.value is None and "1 items here, 2" in uneven.reason
    assert "forget_likeness" not in facts_suite.totals(made(0.9), None)
