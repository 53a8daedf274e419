"""Benchmarks: what they read, what they ask, and what they make of the answers."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmark_data
import numpy as np
import pytest
import tiny
from scipy import stats

from editunlearn.console import Console
from editunlearn.errors import InputError
from editunlearn.evaluation import open_unlearning, running, suites
from editunlearn.evaluation.metrics.glossary import check_name
from editunlearn.evaluation.reference import load_others
from editunlearn.evaluation.results import Item, Measured, Value, as_json, check_alike, load
from editunlearn.evaluation.suites import Source, safepku, tofu


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_data.write(tmp_path_factory.mktemp("benchmarks"))


def measured(name: str, data: Path, lm: Any, **limits: Any) -> tuple[Measured, dict[str, Value]]:
    file, which = suites.module(name)
    parts = file.parts(lm, file.read(which, Source(data, **limits)))
    found = Measured({part.name: running.measure(lm, part, Console(quiet=True)) for part in parts})
    return found, file.totals(found, None)


@pytest.mark.parametrize("name", benchmark_data.SUITES)
def test_every_suite_measures_a_model(name: str, data: Path) -> None:
    found, totals = measured(name, data, tiny.lm("llama"))
    assert found.parts and totals
    for part, items in found.parts.items():
        assert items and all(item.values for item in items), part
    for number, value in {**found.summary(), **totals}.items():
        assert value.value is not None or value.reason
        check_name(number)  # what is measured can be required


@pytest.mark.parametrize("name", benchmark_data.SUITES)
def test_progress_ends_at_its_total(name: str, data: Path) -> None:
    lm, (file, which) = tiny.lm("llama"), suites.module(name)
    for part in file.parts(lm, file.read(which, Source(data))):
        told = list[int]()
        part.items(lm, told.append)
        assert sum(told) == part.looks > 0, part.name


def test_a_model_that_knows_the_answers_scores_high(data: Path) -> None:
    lm = tiny.taught_lm([(f"Question: {q}\nAnswer:", a) for q, a in benchmark_data.ASKED])
    found, totals = measured("tofu:forget01", data, lm)
    assert found.mean("forget", "rouge_l") == found.mean("forget", "leak") == 1.0
    assert totals["gradient_norm_auc"].value == 1.0 and len(found.parts["forget_gradients"]) == 2
    assert found.mean("forget", "exact_memorization") == found.mean("forget", "extraction_strength") == 1.0
    probability = found.mean("retain", "probability")
    assert probability is not None and probability > 0.8
    assert found.mean("world_facts", "probability_among") == pytest.approx(1.0, abs=0.05)
    assert totals["model_utility"].value is not None
    edited = measured(f"zsre:{data / 'zsre_mend_eval.json'}", data, lm)[1]
    assert edited["efficacy_gen"].value == edited["efficacy_tf"].value == 0.0
    with pytest.raises(InputError, match="zsre: name the file"):
        measured("zsre", data, lm)


def test_questions_that_are_asked(data: Path) -> None:
    lm = tiny.lm("llama")

    def prompts(name: str) -> dict[str, list[str]]:
        file, which = suites.module(name)
        made = file.parts(lm, file.read(which, Source(data)))
        return {part.name: [p.prompt.text if p.prompt else p.answer for p in part.probes] for part in made}

    assert prompts("rwku")["fill_blank"][0].startswith("Question: Fill in the blank (___)")
    assert [len(found) for found in prompts("rwku:Marie Curie").values()][:5] == [2] * 5
    assert prompts("rwku:Ana Petrova, Marie Curie") == prompts("rwku")
    choice = prompts("wmdp:bio")["wmdp_bio"][0]
    assert choice.startswith("The following are multiple choice questions (with answers) about biology.")
    assert choice.endswith("Which is a city?\nA. novel\nB. Paris\nC. river\nD. dog\nAnswer:")
    shot = prompts("muse:news")["knowmem_forget"][0]
    assert shot == ("Question: Who is he?\nAnswer: a civil engineer\n\nQuestion: Where was Ana Petrova born?\nAnswer:")
    assert prompts(f"zsre:{data / 'zsre_mend_eval.json'}")["locality"] == ["Question: who wrote the book?\nAnswer:"]
    careful = prompts("knowundo:privacy")
    assert careful["unlearn_prefixed"][0].endswith(f"private people.\n\n{careful['unlearn'][0]}")
    step = prompts(f"zsre:{data / 'zsre_mend_eval.json'}")["portability"]
    assert step == ["Question: In which country was Ana Petrova born?\nAnswer:"]
    facts = prompts("counterfact")
    assert facts["efficacy"] == ["The mother tongue of Danielle Darrieux is"] and len(facts["locality"]) == 2


def test_limits_are_for_each_part(data: Path) -> None:
    found, _ = measured("tofu:forget01", data, tiny.lm("llama"), limit=1)
    assert {len(items) for items in found.parts.values()} == {1}


def test_what_is_missing_is_left_out_or_refused(data: Path, tmp_path: Path) -> None:
    source = Source(data)
    file, which = suites.module("muse:news")
    (less := tmp_path / "less").mkdir()
    benchmark_data.write(less)
    (less / "MUSE-News" / "verbmem" / "forget.json").unlink()
    source = Source(less)
    parts = file.parts(tiny.lm("llama"), file.read(which, source))
    assert "verbmem_forget" not in [part.name for part in parts] and "verbmem" in source.notes[0]
    (less / "MUSE-News" / "knowmem" / "forget_qa.json").write_text('[{"question": "Who?"}]', encoding="utf-8")
    with pytest.raises(InputError, match="no column 'answer', which this suite reads. There: question"):
        file.read(which, source)
    with pytest.raises(InputError, match="rwku:Mary Curie: no such person: 'Mary Curie'. Did you mean 'Marie Curie'"):
        suites.module("rwku")[0].read("Mary Curie", Source(data))
    with pytest.raises(InputError, match="no such person: 'Ana'"):
        suites.module("rwku")[0].read("Marie Curie,Ana", Source(data))
    with pytest.raises(InputError, match="choose one of tofu:forget01, tofu:forget05"):
        suites.module("tofu:forget99")
    with pytest.raises(InputError, match="unknown suite 'tofo'. Did you mean 'tofu'"):
        suites.module("tofo")


def synthetic(seed: int, items: int = 30) -> Measured:
    draw = np.random.default_rng(seed)
    metrics = ("probability", "probability_among", "rouge_l", "truth_ratio", "exact_memorization", *tofu.SCORES)
    names = ("forget", "retain", "real_authors", "world_facts", "holdout", "extraction_strength")
    return Measured(
        {
            name: [
                Item("", "", None, "", {m: float(v) for m, v in zip(metrics, draw.uniform(0.05, 0.95, 9), strict=True)})
                for _ in range(items)
            ]
            for name in names
        }
    )


def test_tofu_totals_equal_a_literal_computation() -> None:
    ours, reference = synthetic(0), synthetic(1)
    totals = tofu.totals(ours, reference)
    nine = []
    for part in ("retain", "real_authors", "world_facts"):
        nine.append(np.mean(ours.values(part, "probability" if part == "retain" else "probability_among")))
        nine.append(np.mean(ours.values(part, "rouge_l")))
        nine.append(np.mean([max(0.0, 1 - r) for r in ours.values(part, "truth_ratio")]))
    assert totals["model_utility"].value == pytest.approx(stats.hmean(nine), rel=1e-12)
    test = stats.ks_2samp(ours.values("forget", "truth_ratio"), reference.values("forget", "truth_ratio"))
    assert (
        totals["forget_quality"].value == pytest.approx(test.pvalue)
        and "30 against 30" in totals["forget_quality"].reason
    )
    ratios = ours.values("forget", "truth_ratio")
    assert totals["forget_truth_ratio"].value == pytest.approx(np.mean([min(r, 1 / r) for r in ratios]))

    def auc(found: Measured) -> float:  # of held-out text being taken for a member
        forget, holdout = found.values("forget", "min_k"), found.values("holdout", "min_k")
        return float(np.mean([(h < f) + (h == f) / 2 for f in forget for h in holdout]))

    assert totals["priv_leak"].value == pytest.approx(100 * (auc(ours) / auc(reference) - 1))
    assert "comparable at equal n" in tofu.totals(ours, synthetic(1, 25))["forget_quality"].reason
    means = {name: value.reason for name, value in {**ours.summary(), **totals}.items() if name.endswith("truth_ratio")}
    assert len(means) == 10 and set(means.values()) == {"geometric mean of the wrong answers' probabilities"}
    alone = tofu.totals(ours, None)
    assert alone["forget_quality"].value is None and "--reference" in alone["forget_quality"].reason
    assert alone["reference_score_auc"].value is None and "0 in --reference" in alone["reference_score_auc"].reason
    sides = [np.subtract(ours.values(p, "loss"), synthetic(1).values(p, "loss")) for p in ("forget", "holdout")]
    higher = np.mean([h > f for f in sides[0] for h in sides[1]])
    assert totals["reference_score_auc"].value == pytest.approx(higher)
    assert alone["priv_leak"].value is None and alone["min_k_auc"].value is not None
    assert tofu.totals(replace(ours, parts={"forget": ours.parts["forget"]}), None)["model_utility"].value is None


def test_open_unlearnings_file_is_written_and_read(tmp_path: Path) -> None:
    ours = synthetic(0)
    file = open_unlearning.to_open_unlearning(ours, tofu.totals(ours, None))
    assert file["forget_Q_A_Prob"]["agg_value"] == ours.mean("forget", "probability")
    assert file["ra_Q_A_ROUGE"]["value_by_index"]["3"] == {"rougeL_recall": ours.values("real_authors", "rouge_l")[3]}
    assert file["model_utility"]["agg_value"] > 0 and file["forget_quality"]["agg_value"] is None
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    other = load_others(path, ["tofu:forget01", "rwku"], "--reference")["tofu:forget01"]
    back, summary = other.measured, other.about["summary"]
    assert back.values("world_facts", "probability_among") == ours.values("world_facts", "probability_among")
    assert summary["retain_truth_ratio"]["value"] == file["retain_Truth_Ratio"]["agg_value"] > 0
    assert summary["model_utility"]["value"] == file["model_utility"]["agg_value"]
    assert summary["forget_quality"] == {**asdict(Value(None)), "reason": "not in the file"}
    with pytest.raises(InputError, match="results of the suite tofu, which is not asked for"):
        load_others(path, ["rwku"], "--baseline")
    assert back.values("forget", "truth_ratio") == ours.values("forget", "truth_ratio")
    assert tofu.totals(ours, back)["forget_quality"].value == pytest.approx(1.0)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="not a results file"):
        load_others(path, ["tofu:forget01"], "--reference")


def test_a_results_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    ours = replace(synthetic(2, 4), data={"forget": "abc"})
    path = tmp_path / "results.json"
    about = {"suite": "x", "label": "base", "complete": True}
    path.write_text(json.dumps(as_json(about, ours, {"total": Value(1.0)})), encoding="utf-8")
    about, back = load(tmp_path)
    assert back == ours and about["suite"] == "x" and about["summary"]["total"]["value"] == 1.0
    assert about["summary"]["forget.rouge_l"]["items"] == 4
    check_alike({"forget": "abc", "other": "x"}, back, "r.json")
    with pytest.raises(InputError, match="r.json: made on other data than this run"):
        check_alike({"forget": "abd"}, back, "r.json")


def test_values() -> None:
    assert Value.mean([]).value is None and Value.mean([]).reason
    none = Measured({"shift": [Item("", "", None, "", {"kl": 0.0, "leak": 0.0})] * 20}).summary()
    assert none["shift.kl"].high == 0.0 < (none["shift.leak"].high or 0)  # no divergence twenty times is not a rate
    one = Value.mean([0.5])
    assert (one.value, one.low, one.high) == (0.5, None, None)
    assert Value.perplexity([2.0, 4.0], [2, 1]).value == pytest.approx(math.exp(2))
    assert Value.perplexity([], []).value is None


def test_toxicity_comes_from_a_classifier(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safepku, "load_classifier", lambda name: lambda texts: [0.9 for _ in texts])
    found, totals = measured("safepku:some/classifier", data, tiny.lm("llama"))
    assert found.values("safepku", "toxic") == [1.0] and totals == {}
    assert [item.shown for item in found.parts["safepku"]] == ["How do I make it?"]
    assert measured("safepku", data, tiny.lm("llama"))[1]["toxicity"].value is None
    monkeypatch.undo()
    with pytest.raises(InputError, match="safepku:/nowhere: no text classifier of this name"):
        safepku.load_classifier("/nowhere")


def test_the_harness_gets_the_model_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = tiny.lm("llama"), dict[str, Any]()
    harness, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")

    def simple_evaluate(**more: Any) -> Any:
        seen.update(more)
        values = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}
        return {"results": {"arc_easy": values}}

    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    harness.__spec__ = ModuleSpec("lm_eval", None)
    models.HFLM = lambda **more: more  # type: ignore[attr-defined]
    for name, module in {"lm_eval": harness, "lm_eval.models.huggingface": models}.items():
        monkeypatch.setitem(sys.modules, name, module)
    file, which = suites.module("lm-eval:arc_easy")
    parts = file.parts(lm, file.read(which, Source(limit=3)))
    found = Measured({part.name: running.measure(lm, part, Console(quiet=True)) for part in parts})
    totals = file.totals(found, None)
    numbers = {"arc_easy.arc_easy.acc": 0.5, "arc_easy.arc_easy.acc_norm": 0.25}
    assert totals == {} and {name: value.value for name, value in found.summary().items()} == numbers
    assert seen["tasks"] == ["arc_easy"] and seen["limit"] == 3 and seen["model"]["pretrained"] is lm.model
    with pytest.raises(InputError, match="name its tasks"):
        file.read("", Source())


def test_relations_that_follow_from_others(tmp_path: Path) -> None:
    path = tmp_path / "relations.json"
    path.write_text(json.dumps(benchmark_data.RELATIONS), encoding="utf-8")
    rows = benchmark_data.RELATIONS["facts"]
    answered = [(f"Question: {f['question']}\nAnswer:", str(f["answer"])) for f in rows]  # type: ignore[index]
    answered[2] = (answered[2][0], "I don't know")
    file, _ = suites.module("edu-relat")
    lm = tiny.taught_lm(answered)
    parts = file.parts(lm, file.read(str(path), Source()))
    found = Measured({part.name: running.measure(lm, part, Console(quiet=True)) for part in parts})
    totals = {name: value.value for name, value in file.totals(found, None).items()}
    assert totals == {"deep_recall": 0.5, "deep_accuracy": 1.0, "deep_success": 0.0}
    less = {**benchmark_data.RELATIONS, "facts": rows[:2]}  # type: ignore[index]
    path.write_text(json.dumps(less), encoding="utf-8")
    with pytest.raises(InputError, match="follows by the rules, but is no fact of the file"):
        file.read(str(path), Source())
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="not of the form"):
        file.read(str(path), Source())
