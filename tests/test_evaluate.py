"""The command evaluate: what it writes and prints, and what it goes on with."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
from evaluations import edited, flags, results
from runs import World, call

from editunlearn.evaluation import running
from editunlearn.evaluation.gates import parse
from editunlearn.evaluation.states import slug


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return edited(tmp_path_factory.mktemp("evaluate") / "world")


def test_a_delta_is_measured_beside_its_base(world: World, tmp_path: Path) -> None:
    delta = ["--delta", str(world.root / "edit"), "--base", "--under", "int8"]
    done = call("evaluate", *flags(world, tmp_path, *delta, "--json"))
    assert done.code == 0, done.err
    by_label = json.loads(done.out)["facts"]
    assert list(by_label) == ["base", "base-int8", "edit", "edit-int8"]
    assert by_label["base"]["leak_gen"]["value"] == 1.0 and by_label["base"]["retain.correct"]["value"] == 1.0
    assert (
        by_label["edit"]["forget.answer_probability"]["value"] < by_label["base"]["forget.answer_probability"]["value"]
    )
    assert by_label["edit"]["leak_gen"]["low"] <= by_label["edit"]["leak_gen"]["value"]
    found = results(tmp_path / "edit" / "facts")
    assert found["complete"] and found["method"] == "memit" and found["parts"]["forget"][0]["said"]
    assert {"forget", "distracted", "paraphrases", "neighbors", "retain", "text"} <= found["parts"].keys()
    assert found["summary"]["perplexity"]["value"] > 1
    assert by_label["base"]["efficacy_gen"]["value"] == by_label["base"]["efficacy_tf"]["value"] == 0.0
    assert by_label["base"]["forget.extraction_strength"]["value"] == by_label["base"]["locality_gen"]["value"] == 1.0
    assert by_label["base"]["locality_tf"]["value"] == 1.0 and by_label["base"]["generalization_tf"]["items"] == 1
    assert by_label["base"]["fluency.ngram_entropy"]["items"] == len(found["parts"]["fluency"]) == 2
    assert "edit-int8" in done.err and "perplexity" in done.err


def test_two_deltas_in_one_call_are_measured_as_each_alone(world: World, tmp_path: Path) -> None:
    other = runs.write_lines(tmp_path / "other.jsonl", runs.FACTS[:1])
    made = world.flags(tmp_path / "other", "--evaluate", "none", "--facts", str(other), "--set", "value.steps=6")
    assert call("apply", *made).code == 0
    deltas = [world.root / "edit", tmp_path / "other"]
    both = call("evaluate", *flags(world, tmp_path / "both", *(f for d in deltas for f in ("--delta", str(d)))))
    assert both.code == 0, both.err
    found = [results(tmp_path / "both" / d.name / "facts")["summary"] for d in deltas]
    assert found[0] != found[1] and not (tmp_path / "both" / "base").exists()
    for delta, summary in zip(deltas, found, strict=True):
        assert call("evaluate", *flags(world, tmp_path / "alone", "--delta", str(delta))).code == 0
        assert results(tmp_path / "alone" / delta.name / "facts")["summary"] == summary


def test_attacks_are_parts_of_their_own(world: World, tmp_path: Path) -> None:
    done = call("evaluate", *flags(world, tmp_path, "--suite", "facts:attacks", "--json"))
    assert done.code == 0, done.err
    summary = json.loads(done.out)["facts:attacks"]["base"]
    assert summary["attack_distraction_recovered"]["items"] == summary["attack_sampling_recovered"]["items"] == 2
    assert summary["attack_sampling.leak"]["items"] == 16
    assert summary["attack_tokenisation_recovered"]["items"] == 2
    for name in ("question", "back_phrasing"):
        assert summary[f"attack_{name}_recovered"]["value"] is None
    assert "no fact has a question" in summary["attack_question_recovered"]["reason"]
    assert {"attack_spelling_recovered", "attack_few_shot_recovered", "attack_pressure.leak"} <= summary.keys()
    assert summary["inside.lens_top1"]["value"] == summary["inside.probe_top10"]["value"] == 1.0  # it does say them


def test_what_is_measured_is_not_measured_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    real = running.measure

    def measure(lm: Any, part: Any, *more: Any) -> Any:
        if part.name == "retain" and not measured.count("stopped"):
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(part.name)
        return real(lm, part, *more)

    monkeypatch.setattr(running, "measure", measure)
    again = flags(world, tmp_path)
    assert call("evaluate", *again).code == 130
    assert not results(tmp_path / "base" / "facts")["complete"]
    before = measured.copy()
    assert call("evaluate", *again).code == 0 and measured[len(before)] == "retain"
    whole = results(tmp_path / "base" / "facts")
    assert whole["complete"] and list(whole["parts"])[0] == "forget"
    count = len(measured)
    assert call("evaluate", *again).code == 0 and len(measured) == count
    assert call("evaluate", *again, "--fresh").code == 0 and measured[count] == "forget"
    assert whole["command"].startswith("editunlearn evaluate --out ") and "--fresh" not in whole["command"]
    assert whole["seconds"].keys() == whole["parts"].keys() and min(whole["seconds"].values()) >= 0
    of_this_run = ("made", "command", "seconds")
    assert {k: v for k, v in results(tmp_path / "base" / "facts").items() if k not in of_this_run} == {
        k: v for k, v in whole.items() if k not in of_this_run
    }
    count = len(measured)
    runs.write_lines(tmp_path / "other.jsonl", [{**f, "answer": "Dutch"} for f in runs.FACTS[:1]])
    assert call("evaluate", *again, "--facts", str(tmp_path / "other.jsonl")).code == 0
    assert "forget" in measured[count:] and "retain" not in measured[count:]


def test_a_probe_fitted_on_other_text_is_measured_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is of the text, too: what is asked stays the same here, what the probe learns from does not."""
    measured: list[str] = []
    real = running.measure
    monkeypatch.setattr(running, "measure", lambda lm, part, *more: measured.append(part.name) or real(lm, part, *more))
    asked = flags(world, tmp_path, "--suite", "facts:attacks")
    assert call("evaluate", *asked, "--limit", "2").code == 0 and "inside" in measured
    measured.clear()
    assert call("evaluate", *asked, "--limit", "3").code == 0
    assert "inside" in measured and "forget" not in measured


def test_requirements(world: World, tmp_path: Path) -> None:
    good = call("evaluate", *flags(world, tmp_path, "--require", "leak_gen >= 0.5", "--require", "forget.leak<=1"))
    assert good.code == 0
    under = flags(world, tmp_path / "under", "--under", "int8", "--require", "leak_gen<=0.02")
    assert call("evaluate", *under).err.count("is not met: 1") == 2
    bad = call("evaluate", *flags(world, tmp_path, "--require", "leak_gen<=0.02"))
    assert bad.code == 3 and "facts, base: leak_gen<=0.02 is not met: 1" in bad.err
    unknown = call("evaluate", *flags(world, tmp_path / "never", "--require", "leak_gem<=0.02"))
    assert unknown.code == 2 and "Did you mean 'leak_gen'" in unknown.err
    assert not (tmp_path / "never").exists()
    assert str(parse("a.b<-1e-3", ours=False)) == "a.b<-0.001"


def test_without_text_there_are_numbers_only(world: World, tmp_path: Path) -> None:
    whole = call("evaluate", *flags(world, tmp_path / "a", "--suite", "facts:attacks", "--json"))
    bare = call("evaluate", *flags(world, tmp_path / "b", "--suite", "facts:attacks", "--json", "--no-text"))
    assert bare.code == 0 and json.loads(bare.out) == json.loads(whole.out)
    for path in (tmp_path / "b").rglob("*.json"):
        text = path.read_text()
        assert "France" not in text and "Paris" not in text and "darrieux" not in text


def test_text_that_was_not_kept_is_asked_for_again(world: World, tmp_path: Path) -> None:
    flag = flags(world, tmp_path)
    assert call("evaluate", *flag, "--no-text").code == 0
    bare = results(tmp_path / "base" / "facts")["parts"]["forget"]
    assert call("evaluate", *flag).code == 0
    found = results(tmp_path / "base" / "facts")["parts"]["forget"]
    assert all(item["shown"] and item["said"] is not None for item in found)
    assert [item["values"] for item in found] == [item["values"] for item in bare]
    assert len({item["group"] for item in found}) == len({item["group"] for item in bare}) == 2


def test_states_that_would_overwrite_each_other(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.root / "edit", tmp_path / "edit-int8")
    both = ["--delta", str(world.root / "edit"), "--delta", str(tmp_path / "edit-int8"), "--under", "int8"]
    done = call("evaluate", *flags(world, tmp_path / "out", *both))
    assert done.code == 2 and "two states would be named 'edit-int8'" in done.err


@pytest.mark.parametrize("suite", ["counterfact:../../x.json", "lm-eval:" + "task," * 90, "rwku:Marie Curie"])
def test_folders_of_suites(suite: str) -> None:
    assert "/" not in slug(suite) and " " not in slug(suite) and len(slug(suite)) <= 60


def test_a_benchmark_with_a_reference(world: World, tmp_path: Path) -> None:
    tofu = ["--suite", "tofu:forget01", "--data-root", str(world.root / "data")]
    first = call("evaluate", *flags(world, tmp_path / "a", *tofu, facts=False))
    assert first.code == 0 and "forget_quality, forget_quality_ks: it compares with a model never trained" in first.out
    reference = str(tmp_path / "a" / "base" / "tofu-forget01")
    second = call("evaluate", *flags(world, tmp_path / "b", *tofu, "--reference", reference, "--json", facts=False))
    summary = json.loads(second.out)["tofu:forget01"]["base"]
    assert summary["forget_quality"]["value"] == pytest.approx(1.0) and summary["forget_quality_ks"]["value"] == 0
    other = call(
        "evaluate", *flags(world, tmp_path / "c", *tofu, "--reference", reference, "--limit", "1", facts=False)
    )
    assert other.code == 2 and "made on other data than this run" in other.err
    beside = call("evaluate", *flags(world, tmp_path / "b", *tofu, "--baseline", reference, facts=False))
    assert "baseline" in beside.out
    theirs = Path(reference, "TOFU_EVAL.json")
    beside = call("evaluate", *flags(world, tmp_path / "b", *tofu, "--baseline", str(theirs), "--dry-run", facts=False))
    assert beside.code == 0, beside.err
    other = ["--baseline", reference, "--limit", "1"]
    refused = call("evaluate", *flags(world, tmp_path / "d", *tofu, *other, facts=False))
    assert refused.code == 2 and "--baseline: made on other data" in refused.err
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()  # before anything was measured


def test_a_reference_or_baseline_that_nothing_is_compared_with(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("evaluate", *flags(world, tmp_path / "a")).code == 0
    own = str(tmp_path / "a" / "base" / "facts")
    assert call("evaluate", *flags(world, tmp_path / "a", "--baseline", own)).code == 0
    monkeypatch.setattr("editunlearn.measuring.load_model", lambda _: pytest.fail("weights were loaded"))
    under = ["--under", "relearn:2", "--reference", own]
    done = call("evaluate", *flags(world, tmp_path / "b", *under))
    assert done.code == 2 and "the suite facts compares with no reference; tofu and muse do" in done.err, done.err
    asked = ["--suite", "wmdp:bio", "--data-root", str(world.root / "data")]
    done = call("evaluate", *flags(world, tmp_path / "b", *asked, "--baseline", own, facts=False))
    assert done.code == 2 and "results of the suite facts, which is not asked for" in done.err
    file = tmp_path / "a" / "base" / "facts" / "results.json"
    file.write_text(json.dumps({**results(file.parent), "complete": False}))
    done = call("evaluate", *flags(world, tmp_path / "b", "--baseline", own))
    assert done.code == 2 and "this evaluation was interrupted" in done.err


@pytest.mark.parametrize("name", ["results.json", "TOFU_EVAL.json", "report.html", "report.csv"])
def test_disk_full(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = flags(world, tmp_path / "runs", "--suite", "tofu:forget01", facts=False)
    evaluate = ["evaluate", *asked, "--data-root", str(world.root / "data"), "--limit", "1"]
    report = ["report", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "page")]
    if name.startswith("report"):
        assert call(*evaluate).code == call(*report).code == 0
        assert call(*report, "--title", "before").code == 0
    command = [*report, "--title", "after"] if name.startswith("report") else evaluate
    before, real = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()}, Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.parent.name.startswith(f".{name}."):
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        done = call(*command)
    assert done.code == 1 and "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: No space left on device") and name in last and "to go on" in last
    after = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()}
    assert name not in {p.name for p in after.keys() - before.keys()} and not list(tmp_path.rglob("*.tmp-*"))
    assert all(after[path] == content for path, content in before.items())  # nothing of the old page is replaced alone
    assert call(*command).code == 0


def test_the_suite_facts_needs_facts(world: World, tmp_path: Path) -> None:
    done = call("evaluate", *flags(world, tmp_path / "out", "--suite", "facts", facts=False))
    assert done.code == 2 and done.err.count("needs --facts FILE") == 1, done.err


def test_everything_that_takes_time_reports_and_ends_at_its_total(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editunlearn.console.PLAIN_INTERVAL", 0.0)
    more = ["--suite", "facts:attacks", "--suite", "tofu:forget01", "--data-root", str(world.root / "data")]
    done = call("evaluate", *flags(world, tmp_path / "runs", *more, "--under", "int8", "--under", "relearn:2"))
    assert done.code == 0, done.err
    lines = re.findall(r"^(.*): (\d+)/(\d+), .* so far", done.err, re.MULTILINE)
    last = {name: (int(count), int(total)) for name, count, total in lines}
    assert {"relearning", "rounding to int8", "base inside", "base shift", "base forget"} <= last.keys()
    assert last["before anything is applied"][0] == last["before anything is applied"][1] > 0
    over = {name: ends for name, ends in last.items() if ends[0] != ends[1]}
    assert not over, over


def test_a_delta_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    import tiny

    other = tiny.lm("llama", seed=5, hidden=48)
    other.model.save_pretrained(tmp_path / "model")
    other.tokenizer.save_pretrained(tmp_path / "model")
    more = ["--delta", str(world.root / "edit"), "--model", str(tmp_path / "model")]
    done = call("evaluate", *flags(world, tmp_path / "out", *more))
    assert done.code == 2 and "sha256" in done.err, done.err


def test_a_dry_run_measures_nothing(world: World, tmp_path: Path) -> None:
    done = call("evaluate", *flags(world, tmp_path / "out", "--dry-run"))
    assert done.code == 0 and "Nothing was measured" in done.err and not (tmp_path / "out").exists()
