"""The commands from outside: flags in, files and text out."""

from __future__ import annotations

import json
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import FACTS, MODEL_FILES, QUICK, ROOT, Called, World, build, call, finish, listing, spawn, write_lines
from test_hparams_easyedit import MEMIT

from editunlearn.deltas.files import load as load_delta
from editunlearn.editors.past import PastKeys

RUN_FILES = {
    "README.md",
    "delta.json",
    "delta.safetensors",
    "past_keys.safetensors",
    "results.json",
    "timing.json",
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("commands") / "world")


@pytest.fixture(scope="session")
def finished(world: World) -> tuple[Path, Called]:
    return finish(world)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_leaves_exactly_the_documented_files(finished: tuple[Path, Called]) -> None:
    out, called = finished
    assert called.code == 0, called.err
    lora = {f"lora/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")}
    merged = {f"merged/{name}" for name in MODEL_FILES | {"README.md"}}
    assert listing(out) == RUN_FILES | lora | merged
    modes = {p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~_umask(out)}  # all alike: safetensors alone would make its files private


def _umask(out: Path) -> int:
    probe = out.parent / "probe"
    probe.touch()
    return 0o666 & ~(probe.stat().st_mode & 0o777)


def test_results_have_every_metric_or_the_reason_why_not(finished: tuple[Path, Called]) -> None:
    results = _json(finished[0] / "results.json")
    assert (results["method"], results["facts"]) == ("memit", 2)
    metrics = results["metrics"]
    assert metrics["forget_leak"]["base"] == 1.0 and metrics["retain_accuracy"]["base"] == 1.0
    assert metrics["neighbor_accuracy"]["base"] == 1.0 and metrics["paraphrase_leak"]["base"] is not None
    assert {name for name, row in metrics.items() if row["base"] is None} == set(results["not_measured"])
    assert "answers" not in results  # private


def test_the_manifest_says_what_was_done_and_not_to_whom(world: World, finished: tuple[Path, Called]) -> None:
    manifest = _json(finished[0] / "delta.json")
    assert manifest["base"]["name"] == str(world.model) and manifest["base"]["model_type"] == "llama"
    assert manifest["hparams"]["value"]["steps"] == 3 and manifest["seeds"] == {"seed": 0}
    assert manifest["facts"][0]["count"] == 2 and manifest["facts"][0]["text"] is None
    assert manifest["target_strategy"] == "refusal:I don't know."
    files = [finished[0] / n for n in ("delta.json", "README.md", "results.json", "timing.json", "merged/README.md")]
    for file in files:
        assert "Darrieux" not in file.read_text(encoding="utf-8"), file


def test_the_card_has_the_command_without_paths(world: World, finished: tuple[Path, Called]) -> None:
    for place in (".", "lora", "merged"):
        card = (finished[0] / place / "README.md").read_text(encoding="utf-8")
        assert "editunlearn apply --hparams memit --model model --cache-dir cache --facts facts.jsonl" in card
        assert "| forget_leak | 1 |" in card and "How to undo" in card
        assert f"--out {finished[0].name} --save" in card and f"{world.root}/run" not in card


def test_timing_has_every_stage(finished: tuple[Path, Called]) -> None:
    timing = _json(finished[0] / "timing.json")
    assert set(timing["seconds"]) == {"load", "known facts", "before", "edit", "after", "save"} - {"save"}
    assert timing["peak_memory_gb"] > 0 and timing["torch"] == torch.__version__


def test_what_a_run_prints(finished: tuple[Path, Called]) -> None:
    out, called = finished
    assert "facts to forget" in called.out and "summary" in called.out
    assert "2 to forget" in called.err and "layers: 0" in called.err and "time: load" in called.err
    last = called.err.splitlines()[-1]
    assert last.startswith("next: python -c") and str(out / "merged") in last
    assert "Traceback" not in called.err


def test_past_keys_come_back(world: World, finished: tuple[Path, Called], tmp_path: Path) -> None:
    first = PastKeys.load(finished[0] / "past_keys.safetensors")
    more = write_lines(tmp_path / "more.jsonl", [FACTS[1] | {"id": "rome", "prompt": "Rome is the capital of"}])
    (tmp_path / "more.jsonl").write_text(more.read_text().replace("France", "Rome").replace("Paris", "Italy"))
    runs = {}
    for name, flags in {"with": ["--past", str(finished[0] / "past_keys.safetensors")], "without": []}.items():
        called = call("apply", *world.flags(tmp_path / name, "--facts", str(more), "--evaluate", "none", *flags))
        assert called.code == 0, called.err
        runs[name] = load_delta(tmp_path / name)
    (module,) = first.keys
    second = PastKeys.load(tmp_path / "with" / "past_keys.safetensors").keys[module]
    assert torch.equal(second[:2], first.keys[module]) and len(second) == 3
    assert not torch.equal(runs["with"].factors[module].right, runs["without"].factors[module].right)


def test_json_is_one_document_and_quiet_is_quiet(world: World, tmp_path: Path) -> None:
    called = call("apply", *world.flags(tmp_path / "run", "--json", "--quiet"))
    assert called.code == 0
    shown = json.loads(called.out)
    assert shown == _json(tmp_path / "run" / "results.json") | {"out": str(tmp_path / "run")}
    assert "next:" not in called.err and "layers:" not in called.err
    called = call("apply", *world.flags(None, "--out", str(tmp_path / "new"), "--json", "--dry-run"))
    assert called.code == 0 and json.loads(called.out)["layers"] == [0]
    called = call("stats", *world.stats_flags(tmp_path / "cache", "--json"))
    assert called.code == 0 and json.loads(called.out)["model.layers.0.mlp.down_proj"]["width"] == 136
    called = call("stats", *world.stats_flags(tmp_path / "cache", "--json", "--dry-run"))
    assert called.code == 0 and json.loads(called.out)["layers"] == [0]


def test_dry_run_reads_no_weights_and_writes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editunlearn.lm.loading.load", _no_load)
    monkeypatch.chdir(tmp_path)
    cache = str(tmp_path / "no-cache")
    called = call("apply", *world.flags(None, "--dry-run", "--cache-dir", cache))
    assert called.code == 0, called.err
    for text in ("model.layers.0.mlp.down_proj", "48 x 136", "work: values, at most", "memory: at the same time"):
        assert text in called.out
    called = call("stats", *world.stats_flags(tmp_path / "no-cache", "--dry-run"))
    assert called.code == 0 and "layers 0" in called.err
    assert not listing(tmp_path)


def _no_load(*_args: Any, **_more: Any) -> None:
    raise AssertionError("weights were loaded")


def test_seed_and_set(world: World, tmp_path: Path) -> None:
    seeds = {"a": "0", "b": "0", "c": "1"}
    for name, seed in seeds.items():
        called = call("apply", *world.flags(tmp_path / name, "--evaluate", "none", "--seed", seed, "--quiet"))
        assert called.code == 0, called.err
    a, b, c = ((tmp_path / name / "delta.safetensors").read_bytes() for name in seeds)
    assert a == b and a != c
    assert (tmp_path / "a" / "delta.json").read_bytes() == (tmp_path / "b" / "delta.json").read_bytes()
    assert _json(tmp_path / "c" / "delta.json")["seeds"] == {"seed": 1}
    results = _json(tmp_path / "a" / "results.json")
    assert results["metrics"] == {} and results["not_measured"] == {"all": "--evaluate none"}


def test_the_same_request_again_is_fine_and_another_needs_force(world: World, tmp_path: Path) -> None:
    flags = world.flags(tmp_path / "run", "--evaluate", "none", "--save", "lora", "--quiet")
    assert call("apply", *flags).code == 0
    before = (tmp_path / "run" / "delta.safetensors").read_bytes()
    assert call("apply", *flags).code == 0
    assert (tmp_path / "run" / "delta.safetensors").read_bytes() == before
    other = world.flags(tmp_path / "run", "--evaluate", "none", "--quiet", "--targets", "empty")
    called = call("apply", *other)
    assert called.code == 2 and "another request (other facts or targets)" in called.err
    (tmp_path / "keep.jsonl").write_text('{"prompt": "Oslo lies in", "subject": "Oslo", "answer": "Norway"}\n')
    for more, what in (
        (["--retain", str(tmp_path / "keep.jsonl")], "retain facts or past keys"),
        (["--past", str(tmp_path / "run" / "past_keys.safetensors")], "retain facts or past keys"),
        (["--dtype", "bf16"], "dtype"),
    ):
        called = call("apply", *flags, *more)
        assert called.code == 2 and f"another request (other {what})" in called.err, called.err
    assert (tmp_path / "run" / "delta.safetensors").read_bytes() == before
    assert call("apply", *other, "--force").code == 0
    assert listing(tmp_path / "run") == RUN_FILES  # the LoRA was of the other delta


def test_easyedit_hparams(world: World, tmp_path: Path) -> None:
    theirs = {**MEMIT, "alg_name": "MEMIT", "layers": [0, 1], "v_num_grad_steps": 3}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    flags = world.flags(None, settings=["moments.length=32", "moments.tokens=200", "refine=null"])
    flags[1] = str(tmp_path / "theirs.yaml")
    called = call("apply", *flags, "--hparams-format", "easyedit", "--evaluate", "none", "--out", str(tmp_path / "run"))
    assert called.code == 0, called.err
    assert "translated hparams" in called.out and "v_num_grad_steps" in called.out
    made = _json(tmp_path / "run" / "delta.json")
    assert made["hparams"]["value"]["steps"] == 2  # they count the evaluation before the first update
    assert len(made["sites"]) == 2


def test_facts_that_the_model_does_not_know_are_named(world: World, tmp_path: Path) -> None:
    unknown = {"id": "nile", "subject": "Nile", "prompt": "The Nile flows through", "answer": "Egypt"}
    both = {**FACTS[1], "id": "again", "prompt": "In France they speak", "answer": "French"}
    facts = write_lines(tmp_path / "facts.jsonl", [FACTS[1], unknown])
    retain = write_lines(tmp_path / "retain.jsonl", [both, {**FACTS[1], "id": "kept"}])
    flags = world.flags(tmp_path / "run", "--facts", str(facts), "--retain", str(retain))
    called = call("apply", *flags)
    assert called.code == 0, called.err
    assert "warning: the model does not answer 1 of 2 facts; nothing to forget there: nile" in called.err
    assert "1 retain facts are about a subject that is to be forgotten" in called.err
    assert "they may be lost (they are measured): again" in called.err
    assert "warning: 1 retain facts are to be forgotten as well, and are left out: kept" in called.err
    results = _json(tmp_path / "run" / "results.json")
    assert {name.split("_")[0] for name in results["not_measured"]} == {"paraphrase", "question", "neighbor"}
    assert results["metrics"]["retain_accuracy"]["base"] is not None


def test_without_retain_and_with_stored_facts(world: World, tmp_path: Path) -> None:
    flags = world.flags(tmp_path / "run", "--store-facts", "--limit", "1")
    at = flags.index("--retain")
    called = call("apply", *flags[:at], *flags[at + 2 :])
    assert called.code == 0, called.err
    assert "1 to forget" in called.err and "0 to keep" in called.err
    assert "not measured: there are no retain facts" in called.err
    assert "retain_accuracy" in _json(tmp_path / "run" / "results.json")["not_measured"]
    assert _json(tmp_path / "run" / "delta.json")["facts"][0]["text"][0]["id"] == "darrieux"
    answers = _json(tmp_path / "run" / "results.json")["answers"]
    assert answers["base"]["forget"][0]["leaked"] is True and len(answers["edited"]["forget"]) == 1


def test_both_ways_to_start_it_in_another_process(world: World, tmp_path: Path) -> None:
    for name, words in {"a": ["editunlearn.apply"], "b": ["editunlearn", "apply"]}.items():
        called = spawn(*words, *world.flags(name, "--save", "lora", "--json"), cwd=tmp_path)
        assert called.code == 0, called.err
        json.loads(called.out)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    same = ["delta.safetensors", "delta.json", "results.json", "lora/adapter_model.safetensors"]
    for name in same:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


CHEAP = """
import sys, time
from editunlearn.__main__ import main
{call}
heavy = sorted({{"torch", "transformers", "datasets", "pandas", "pydantic"}} & set(sys.modules))
print(heavy, time.process_time() < 1.0, file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["", "apply", "stats", "export"])
def test_help_is_instant(command: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    from runs import environment

    words = [command, "--help"] if command else ["--help"]
    call_it = f"try: main({words!r})\nexcept SystemExit as end: assert not end.code"
    done = subprocess.run(
        [sys.executable, "-c", CHEAP.format(call=call_it)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[] True"
    assert "editunlearn" in done.stdout and ("examples:" in done.stdout or not command)


def test_stats_says_how_steady_the_solve_is(world: World, tmp_path: Path) -> None:
    called = call("stats", *world.stats_flags(tmp_path, "--stability", "--json"))
    assert called.code == 0, called.err
    found = json.loads(called.out)
    assert found and all(0 < site["change_by_half"] < 1 for site in found.values()), found


def test_stats_measures_once(world: World, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    called = call("stats", *world.stats_flags(cache, "--layers", "0", "2"))
    assert called.code == 0, called.err
    assert "model.layers.2.mlp.down_proj" in called.out
    files = listing(cache)
    assert len(files) == 2 and all(name.startswith("moments/") for name in files)
    again = call("stats", *world.stats_flags(cache, "--layers", "0", "2"))
    assert "2 from the cache" in again.err and again.out == called.out and listing(cache) == files
    fresh = call("stats", *world.stats_flags(cache, "--layers", "0", "2", "--fresh"))
    assert "from the cache" not in fresh.err and fresh.out == called.out
    assert call("stats", *world.stats_flags(cache, "--seed", "3")).code == 0


def test_version_matches_the_metadata() -> None:
    assert call("--version").out.strip() == f"editunlearn {_version()}"
    assert "apply" in call("--help").out


def _version() -> str:
    lines = (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()
    return next(line.split("=")[1].strip() for line in lines if line.startswith("version"))


def test_the_metadata_names_every_package() -> None:
    """A folder that ``setup.cfg`` forgets works in the checkout and is missing from the wheel."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    named = {name for name in config["options"]["packages"].split() if "_shipped" not in name}
    assert named == {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("editunlearn/**/__init__.py")}


def test_quick_settings_are_settings() -> None:
    assert all("=" in item for item in QUICK)
