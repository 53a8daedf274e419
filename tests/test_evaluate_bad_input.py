"""evaluate: bad input and bad data are found before weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from evaluations import edited, flags
from runs import World, call


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return edited(tmp_path_factory.mktemp("evaluate") / "world")


CASE = benchmark_data.FILES["counterfact/test"][0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--suite", "fact"], "unknown suite 'fact'. Did you mean 'facts'"),
        (["--suite", "facts:all"], "write facts or facts:attacks"),
        (["--under", "int3"], "unknown treatment 'int3'. Did you mean 'int8'"),
        (["--under", "int8:3"], "unknown treatment 'int8:3'"),
        (["--under", "relearn:0"], "a number from 1, of steps of fine-tuning"),
        (["--require", "leak_gen=0"], 'write METRIC, <=, >=, < or >, and a number: "leak_gen<=0.02"'),
        (["--under", "relearn", "--limit", "1"], "of ROOT/facts.jsonl 1 is taken (--limit 1), at least 2 are needed"),
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--seed", "-1"], "--seed -1: at least 0"),
        (["--delta", "nowhere"], "nowhere/delta.json does not exist"),
        (["--reference", "nowhere.json"], "nowhere.json: no such file"),
        (["--facts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--suite", "wmdp:bio", "--data-root", "nowhere"], "--data-root nowhere: no such folder"),
    ],
)
def test_bad_input_is_found_before_weights_are_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    monkeypatch.setattr("editunlearn.measuring.load_model", lambda _: pytest.fail("weights were loaded"))
    done = call("evaluate", *flags(world, tmp_path / "out", *more))
    assert done.code == 2 and said.replace("ROOT", str(world.root)) in done.err, done.err
    assert "needs --facts" not in done.err
    assert not (tmp_path / "out").exists()


BAD_DATA: list[tuple[str, str, Any, str]] = [
    ("knowundo:privacy", "KnowUnDo/privacy/unlearn", [{"val": []}], "'val' is no list of records"),
    ("knowundo:privacy", "KnowUnDo/privacy/retention", [{"val": "x"}], "'val' is no list of records"),
    ("knowundo:privacy", "KnowUnDo/privacy/unlearn", [{"val": [{"text": "x"}]}], "record 0 of 'val' has no 'text' or"),
    ("edu-relat:ROOT/r.json", "r", {"facts": [], "rules": [], "targets": []}, "it has 0 facts and 0 targets"),
    ("edu-relat:ROOT/r.json", "r", {**benchmark_data.RELATIONS, "targets": []}, "it has 5 facts and 0 targets"),
    ("wmdp:bio", "wmdp/wmdp-bio/test", [], "the list is empty"),
    ("wmdp:bio", "wmdp/wmdp-bio/test", [{"question": "", "choices": ["a", "b"], "answer": 0}], "none of its 1 records"),
    ("wmdp:bio", "wmdp/wmdp-bio/test", [{"question": "q", "choices": "ab", "answer": 0}], "'choices' is a list of 2"),
    ("wmdp:bio", "wmdp/wmdp-bio/test", [{"question": "q", "choices": ["a", "b"], "answer": 2}], "a number from 0 to 1"),
    ("rwku", "RWKU/utility_general", [{"question": "q", "choices": ["a", "b"], "answer": -1}], "from 0 to 1; it is -1"),
    ("counterfact:ROOT/c.json", "c", [{**CASE, "requested_rewrite": "x"}], "case 0 has no requested_rewrite.prompt"),
    ("counterfact:ROOT/c.json", "c", [{**CASE, "paraphrase_prompts": None}], "no column 'paraphrase_prompts'"),
    ("counterfact:azhx/counterfact:train", "counterfact/test", [CASE], "counterfact has no 'train'. It has test.json"),
    ("muse:news", "MUSE-News/knowmem/retain_qa_icl", [], "the list is empty"),
    ("tofu:forget01", "TOFU/holdout01", {"question": []}, "holdout01"),
]


@pytest.mark.parametrize(("suite", "file", "content", "said"), BAD_DATA)
def test_bad_benchmark_data_are_found_before_weights_are_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suite: str, file: str, content: Any, said: str
) -> None:
    monkeypatch.setattr("editunlearn.measuring.load_model", lambda _: pytest.fail("weights were loaded"))
    root = benchmark_data.write(tmp_path / "data")
    (root / f"{file}.json").write_text(json.dumps(content))
    asked = ["--suite", suite.replace("ROOT", str(root)), "--data-root", str(root)]
    done = call("evaluate", *flags(world, tmp_path / "out", *asked, facts=False))
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_there_is_noted(world: World, tmp_path: Path) -> None:
    data = ["--suite", "counterfact:azhx/counterfact:test:nowhere", "--data-root", str(world.root / "data")]
    done = call("evaluate", *flags(world, tmp_path / "out", *data, "--dry-run", facts=False))
    assert done.code == 0 and "read whole, it has no split 'nowhere'" in done.err
