"""The report: what is put side by side, what is said of it, and a page that stands by itself."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import call

from editunlearn.evaluation.metrics.glossary import better, definition_of
from editunlearn.evaluation.report import page, plots
from editunlearn.evaluation.report.gathering import gather
from editunlearn.evaluation.report.verdict import verdicts
from editunlearn.evaluation.results import Item, Measured, Value, as_json


def write(root: Path, label: str, leak: float, *, kept: float = 1.0, suite: str = "facts", **more: Any) -> Path:
    """Results of twenty facts of which a share leaks, and twenty held-out ones of which a share is kept."""

    def items(share: float, name: str, said: str) -> list[Item]:
        hits = round(20 * share)
        return [
            Item(f"Prompt <{i}>", "Paris & Rome", f"{said} {i}", f"f{i}", {name: float(i < hits), "refusal": i >= hits})
            for i in range(20)
        ]

    attack = [Item("", "", "", f"f{i}", {"leak": float(i < 20 * more.get("hint", leak))}) for i in range(20)]
    measured = Measured(
        {
            "forget": items(leak, "leak", "<script>alert(1)</script>"),
            "heldout": items(kept, "correct", "said"),
            "attack_hint": attack,
        },
        {"forget": "a", "heldout": more.get("data", "b"), "attack_hint": "c"},
    )
    about = {
        "label": label,
        "suite": suite,
        "complete": True,
        "model": "tiny",
        "weights": "w",
        "dtype": "float32",
        "delta": None if label.startswith("base") else {"site": 1},
        "method": None if label.startswith("base") else "memit",
        "under": more.get("under"),
        "limit": None,
        "made": "2026-01-01T00:00:00Z",
        "environment": {"torch": "2"},
    }
    totals = {
        "leak_gen": Value.mean(measured.values("forget", "leak")),
        "attack_hint_recovered": Value.mean(measured.values("attack_hint", "leak")),
        "perplexity": Value(more.get("perplexity", 20.0)),
        "forget_quality": Value(None, reason="needs a reference"),
    }
    file = root / label / suite / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(as_json(about, measured, totals)), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("edited", "under", "good", "said"),
    [
        ({"leak": 0.0}, 0.0, True, "Suppressed; held against 2 ways to bring it back."),
        ({"leak": 0.0, "hint": 0.5}, 0.3, False, "Suppressed; comes back: hint, rounded to int4."),
        ({"leak": 0.5}, 0.5, False, "Not gone."),
        ({"leak": 0.0, "kept": 0.5}, 0.0, False, "Suppressed; held against 2 ways to bring it back; other knowledge"),
        ({"leak": 0.0, "perplexity": 30.0}, 0.0, False, "other knowledge was damaged"),
    ],
)
def test_verdicts(tmp_path: Path, edited: dict[str, Any], under: float, good: bool, said: str) -> None:
    write(tmp_path, "base", 1.0)
    write(tmp_path, "memit", **edited)
    write(tmp_path, "memit-int4", under, under="int4")
    found = verdicts(gather([tmp_path])["facts"])
    assert len(found) == 1 and found[0].good == good and said in found[0].headline
    assert any("held" in line for line in found[0].lines)
    without = verdicts(gather([tmp_path / "memit"])["facts"])[0]
    assert "cannot be said" in without.lines[-1] and not without.good and "not measured" in without.headline
    write(tmp_path / "ignorant", "base", 0.1)
    never = verdicts(gather([tmp_path / "ignorant", tmp_path / "memit"])["facts"])[0]
    assert not never.good and "not known before" in never.headline


def test_columns_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    write(tmp_path, "base", 1.0)
    write(tmp_path, "memit", 0.0, data="other")
    columns = gather([tmp_path])["facts"]
    section = page.section("facts", columns)
    assert any("heldout asked different things" in note for note in section.notes)
    assert "heldout" not in section.items and "forget" in section.items
    assert [column.label for column in columns] == ["base", "memit"]


def test_equal_labels_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "one", "memit", 0.0)
    write(tmp_path / "two", "memit", 0.5)
    labels = [column.label for column in gather([tmp_path])["facts"]]
    assert labels == ["memit", "two/memit"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": None}, "damaged, it has no parts. Remove it"),
        ({"complete": None, "summary": None}, "damaged, it has no complete, summary."),
        ({"parts": {"forget": [{"x": 1}]}}, "damaged, Item.__init__() got an unexpected keyword argument 'x'"),
        ({"summary": {"leak_gen": 0.5}}, "damaged, "),
        ({"version": 2}, "format version 2; this package reads 1"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = write(tmp_path / "runs", "memit", 0.0)
    whole = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))
    for command in (
        ["report", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "page")],
        ["evaluate", "--suite", "facts", "--facts", "no.jsonl", "--baseline", str(file), "--out", str(tmp_path / "o")],
    ):
        done = call(*command)
        assert done.code == 2 and f"{file}: {said}" in done.err, done.err
    assert not (tmp_path / "page").exists()


def test_open_unlearnings_results_stand_beside_ours(tmp_path: Path) -> None:
    def by_index(key: str, value: float) -> dict[str, Any]:
        return {"agg_value": value, "value_by_index": {str(i): {key: value} for i in range(40)}}

    numbers = {"model_utility": {"agg_value": 0.6}, "forget_quality": {"agg_value": None}}
    file = {**numbers, "forget_truth_ratio": by_index("score", 0.5), "forget_Q_A_Prob": by_index("prob", 0.25)}
    (tmp_path / "theirs" / "npo").mkdir(parents=True)
    (tmp_path / "theirs" / "npo" / "TOFU_EVAL.json").write_text(json.dumps(file))
    ours = write(tmp_path / "ours", "memit", 0.0, suite="tofu:forget01")
    ours.with_name("TOFU_EVAL.json").write_text("{}")  # beside ours it says the same again
    columns = gather([tmp_path])["tofu:forget01"]
    assert [(c.label, c.value("model_utility")) for c in columns] == [("memit", None), ("npo", 0.6)]
    assert (
        columns[1].value("forget.probability") == 0.25
        and columns[1].about["summary"]["forget.probability"]["items"] == 40
    )
    section = page.section("tofu:forget01", columns)
    assert not any("differ" in note for note in section.notes) and "npo" in page.html("x", [section])
    assert gather([tmp_path / "theirs" / "npo" / "TOFU_EVAL.json"]).keys() == {"tofu:forget01"}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids.add(found.get("id") or "")
        if tag == "a" and (found.get("href") or "").startswith("#"):
            self.links.append(str(found["href"])[1:])
        for name in ("src", "href"):
            value = found.get(name) or ""
            if value and not value.startswith(("#", "data:")):
                self.outside.append(value)


def test_the_page_stands_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "runs", "base", 1.0)
    write(tmp_path / "runs", "memit", 0.1)
    done = call("report", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--title", "Ours & theirs")
    assert done.code == 0 and "facts, memit: Not gone." in done.out, done.err
    text = (tmp_path / "out" / "report.html").read_text()
    seen = _Page()
    seen.feed(text)
    assert not seen.outside and set(seen.links) <= seen.ids and seen.tags.count("svg") == 2
    assert "<li>forget_quality: needs a reference</li>" in text  # notes can be read without a pointer, too
    assert "d-leak_rate" in seen.links and "Ours &amp; theirs" in text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text  # what a model says is not run
    assert not re.findall(r"https?://(?!www\.w3\.org)", text.replace("http://purl.org", ""))
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    assert {"suite": "facts", "run": "memit", "metric": "leak_gen", "value": "0.1"}.items() <= next(
        row for row in rows if row["run"] == "memit" and row["metric"] == "leak_gen"
    ).items()
    assert "| leak_gen | lower | 1 (0.839 to 1) | 0.1 (0.0279 to 0.301) |" in (tmp_path / "out/report.md").read_text()


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    write(tmp_path / "runs", "base", 1.0)
    write(tmp_path / "runs", "memit", 0.1)
    sections = [page.section(suite, columns) for suite, columns in gather([tmp_path / "runs"]).items()]
    again = [page.section(suite, columns) for suite, columns in gather([tmp_path / "runs"]).items()]
    assert page.html("x", sections) == page.html("x", again)


def test_without_matplotlib_there_is_a_page_without_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    write(tmp_path, "base", 1.0)
    section = page.section("facts", gather([tmp_path])["facts"])
    assert not section.plots and "editunlearn[report]" in section.notes[-1]


def test_places_without_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    done = call("report", "--runs", str(tmp_path), str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert done.code == 2 and done.err.count("no results.json of 'editunlearn evaluate'") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "definition", "way"),
    [
        ("forget.leak", "leak_rate", "lower"),
        ("heldout.correct", "accuracy", "higher"),
        ("heldout.refusal", "refusal_rate", "lower"),
        ("attack_hint_recovered", "recovered", "lower"),
        ("min_k_plus_plus_auc", "membership_auc", "reference"),
        ("retain_truth_ratio", "utility_truth_ratio", "higher"),
        ("forget.truth_ratio", "truth_ratio", "reference"),
        ("unlearn_success", "exact_memorization", "higher"),
        ("unlearn_prefixed_success", "exact_memorization", "higher"),
        ("portability_gen", "portability_gen", "higher"),
        ("forget_quality_ks", "forget_quality", "lower"),
        ("utility_general.chosen", "choice_accuracy", "higher"),
        ("adversarial.role_play.rouge_l", "rouge_l", "lower"),
    ],
)
def test_every_number_is_linked_to_its_definition(name: str, definition: str, way: str) -> None:
    found = definition_of(name)
    assert found is not None and found.name == definition and better(name) == way
    assert definition_of("something else") is None and better("something else") == "reference"


def test_apply_can_end_with_the_page(tmp_path: Path) -> None:
    world = runs.build(tmp_path / "world")
    done = call("apply", *world.flags(tmp_path / "out", "--evaluate", "quick"))
    assert done.code == 0, done.err
    text = (tmp_path / "out" / "report.html").read_text()
    assert "2 facts, memit on" in text and "Danielle Darrieux" in text and "leak_gen" in text
    again = call("apply", *world.flags(tmp_path / "plain"))
    assert again.code == 0 and not (tmp_path / "plain" / "report.html").exists()
    for path in (tmp_path / "plain").rglob("*.*"):
        assert path.is_dir() or b"Darrieux" not in path.read_bytes(), path  # the text of facts is kept only if asked
