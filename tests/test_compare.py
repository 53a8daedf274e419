"""The command compare on a tiny model: the queue, what it writes, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edits import Killed
from runs import FACTS, RETAIN, Called, World, build, call, listing, write_lines
from transformers import AutoConfig

from editunlearn.comparing.asking import Asking, requests, split
from editunlearn.comparing.queue import Queue
from editunlearn.comparing.retraining import PASSAGE, per_token
from editunlearn.facts.readers import load_facts
from editunlearn.facts.targets import DEFAULT_TARGETS

FILES = {"comparison.json", "comparison.md", "pareto.svg", "report.html", "request.json"}
HPARAMS = {
    "grin": "method: grin\nfraction: 0.3\ntrain: {epochs: 4, lr: 0.01, batch: 2}\n",
    "idk": "method: idk\ntrain: {what: lora, rank: 2, epochs: 12, lr: 0.03, batch: 2}\n",
    "wild": "method: npo\ntrain: {epochs: 9, lr: 0.05, batch: 1}\nlimits: {norm: 0.01}\n",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = build(tmp_path_factory.mktemp("compare") / "world")
    for name, text in HPARAMS.items():
        (made.root / f"{name}.yaml").write_text(text)
    return made


def flags(world: World, out: Path, *more: str, methods: str = "grin,idk,wild") -> list[str]:
    found = ["--model", str(world.model), "--cache-dir", str(world.cache), "--facts", str(world.root / "facts.jsonl")]
    named = [str(world.root / f"{m}.yaml") if m in HPARAMS else m for m in methods.split(",")]
    found += ["--retain", str(world.root / "retain.jsonl"), "--methods", ",".join(named), "--out", str(out)]
    return [*found, *more]


@pytest.fixture(scope="module")
def killed(world: World) -> Iterator[tuple[Path, list[str], Called]]:
    """A comparison that was killed in an edit and while it measured, and then finished; and the edits that it made."""
    out, edited = world.root / "c", []
    edit, ask = Queue._edit, Asking.ask

    def dies(self: Queue, hp: Any, folder: Path) -> Any:
        edited.append(str(folder))
        if len(edited) == 2:
            raise Killed
        return edit(self, hp, folder)

    def stops(self: Asking, which: str, folder: Path, label: str, delta: Any) -> Any:
        if label == "idk" and which == "validation":
            raise Killed
        return ask(self, which, folder, label, delta)

    words = flags(world, out, "--trials", "2", "--seeds", "2", "--match", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Queue, "_edit", dies)
        with pytest.raises(Killed):
            call("compare", *words)
        patch.setattr(Asking, "ask", stops)
        with pytest.raises(Killed):
            call("compare", *words)
        patch.setattr(Asking, "ask", ask)
        finished = call("compare", *words)
    yield out, edited, finished


def test_a_killed_comparison_goes_on(killed: tuple[Path, list[str], Called]) -> None:
    out, edited, called = killed
    assert called.code == 0, called.err
    again = [folder for folder in set(edited) if edited.count(folder) > 1]
    assert again == [edited[1]]  # the one that was killed; what was only not measured yet is not made again
    assert FILES <= listing(out)
    found = json.loads((out / "comparison.json").read_text())
    assert set(found["methods"]) == {"grin", "grin:random", "idk", "wild"}
    assert [row["name"] for row in found["views"]["chosen"]] == ["base", "grin", "grin:random", "idk"]
    for row in found["views"]["chosen"][1:]:
        assert row["values"]["leak"]["items"] == 2 and row["values"]["leak"]["low"] is not None
    idk = found["methods"]["idk"]
    assert [p["trial"] for p in idk["validation"]] == [0, 1] and not idk["failed"]
    for cost in idk["costs"]:
        assert cost["seconds"] > 0 and cost["flops"] > 1e6 and cost["tokens"] > 100 and 0 < cost["changed"] < 1


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(killed: tuple[Path, list[str], Called]) -> None:
    out, _, called = killed
    wild = json.loads((out / "comparison.json").read_text())["methods"]["wild"]
    assert wild["chosen"] is None and "limits.norm" in wild["failed"]["trial0-seed0"]
    assert "diverged" in called.out and "wild" in (out / "comparison.md").read_text()


def test_what_is_shown_was_chosen_on_the_other_half(killed: tuple[Path, list[str], Called]) -> None:
    out, _, _ = killed
    methods = json.loads((out / "comparison.json").read_text())["methods"]
    for name in ("grin", "idk"):
        best = f"trial{methods[name]['chosen']}"
        asked = {
            half: json.loads((out / "runs" / name / f"{best}-seed0" / half / "results.json").read_text())["parts"]
            for half in ("validation", "test")
        }
        for part in ("forget", "retain", "heldout"):
            first, second = ({item["shown"] for item in asked[half][part]} for half in ("validation", "test"))
            assert first and second and not first & second
    folder = out / "runs" / "idk" / "trial0-seed0"
    assert json.loads((folder / "delta.json").read_text())["target_strategy"] == DEFAULT_TARGETS
    page = (out / "report.html").read_text()
    assert "Forgotten against kept, by method" in page and "grin:random" in page and "base" in page
    assert (out / "pareto.svg").read_text().startswith("<svg")


def test_what_is_done_is_not_done_again_and_terms_cannot_change(
    world: World, killed: tuple[Path, list[str], Called]
) -> None:
    out, edited, _ = killed
    before, count = (out / "comparison.json").read_bytes(), len(edited)
    words = flags(world, out, "--trials", "2", "--seeds", "2", "--match", "1")
    called = call("compare", *words)
    assert called.code == 0 and len(edited) == count and (out / "comparison.json").read_bytes() == before
    called = call("compare", *words, "--targets", "empty", "--budget", "wall:9")
    assert called.code == 2 and "on other terms (other targets, budget)" in called.err
    assert "general facts" not in called.err


def test_over_budget_is_a_failure_and_can_be_retried(world: World, tmp_path: Path) -> None:
    words = flags(world, tmp_path / "b", "--budget", "flops:1000", methods="idk")
    called = call("compare", *words)
    assert called.code == 0 and "over the budget of 1e+03 floating-point operations" in called.out
    assert not list((tmp_path / "b").rglob("delta.json"))
    assert "failed" in call("compare", *words, "--retry").out


def test_cost_beside_training_anew(world: World, tmp_path: Path) -> None:
    called = call("compare", *flags(world, tmp_path / "c", "--trained-on", "1e9", methods="grin"))
    assert called.code == 0, called.err
    cost = json.loads((tmp_path / "c" / "comparison.json").read_text())["methods"]["grin"]["costs"][0]
    times = per_token(AutoConfig.from_pretrained(world.model), PASSAGE).trained * 1e9 / cost["flops"]
    assert f"| {times:.2g} times |" in (tmp_path / "c" / "comparison.md").read_text()


def test_dry_run(world: World, tmp_path: Path) -> None:
    called = call("compare", *flags(world, tmp_path / "x", "--trials", "3", "--dry-run", methods="memit,sure"))
    assert called.code == 0, called.err
    assert "moments.weight" in called.out and "10000, 3000, 30000" in called.out and "sure:random" in called.out
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "memmit"], "Did you mean 'memit'"),
        (["--methods", ","], "none is named"),
        (["--trials", "0"], "--trials 0: from 1"),
        (["--seeds", "0"], "--seeds 0: at least 1"),
        (["--limit", "1"], "at least 2 are needed"),
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--budget", "hours:2"], "wall:SECONDS"),
        (["--match", "5"], "--match 5: a rate"),
        (["--trained-on", "-2"], "--trained-on -2: a number of tokens"),
        (["--suite", "fakts"], "unknown suite 'fakts'. Did you mean 'facts'"),
        (["--suite", "quick", "--suite", "facts:attacks"], "ask the same facts"),
        (["--retain", "EMPTY"], "empty.jsonl"),
        (["--retain", "SAME"], "0 are not about a subject"),
        (["--targets", "refusl"], "Did you mean 'refusal'"),
    ],
)
def test_bad_input_is_found_before_weights(world: World, tmp_path: Path, more: list[str], message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    places = {"EMPTY": str(tmp_path / "empty.jsonl"), "SAME": str(world.root / "facts.jsonl")}
    called = call("compare", *flags(world, tmp_path / "x"), *(places.get(word, word) for word in more))
    assert called.code == 2 and message in called.err, called.err
    assert "general facts" not in called.err and not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for more in ([], ["--fresh"]):
        called = call("compare", *flags(world, tmp_path, *more))
        assert called.code == 2 and "no comparison made it" in called.err and listing(tmp_path) == {"thesis.tex"}


def test_halves_share_no_subject(tmp_path: Path) -> None:
    twice = [*FACTS, {"id": "france-2", "subject": "France", "prompt": "The money of France is", "answer": "Euro"}]
    facts, retain = (load_facts(write_lines(tmp_path / f"{n}.jsonl", rows)) for n, rows in enumerate((twice, RETAIN)))
    made = requests(facts, retain, [], ["a", "b", "c"], attacks=True)
    first, second = made["validation"], made["test"]
    assert {f.subject for f in first.facts} & {f.subject for f in second.facts} == set()
    assert len(first.facts) + len(second.facts) == 3 and (list(first.text), list(second.text)) == (["a", "c"], ["b"])
    assert second.attacks and not first.attacks and [len(half) for half in split(retain).values()] == [1, 1]
