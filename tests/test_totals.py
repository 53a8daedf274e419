"""What benchmarks make of their items, worked by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from editunlearn.evaluation.metrics.intervals import estimate
from editunlearn.evaluation.results import Item, Measured, Value
from editunlearn.evaluation.suites import facts, knowundo, muse, rwku, tofu, wmdp
from editunlearn.evaluation.suites.editing import editing_totals


def measured(parts: Mapping[str, Mapping[str, Sequence[float]]], group: Mapping[str, Sequence[str]] = {}) -> Measured:
    """Items from ``part -> metric -> values``; ``group`` by part."""
    found = {}
    for part, columns in parts.items():
        count = max(map(len, columns.values()))
        names = group.get(part, [""] * count)
        values = [{name: column[i] for name, column in columns.items() if i < len(column)} for i in range(count)]
        found[part] = [Item("", "", None, names[i], values[i]) for i in range(count)]
    return Measured(found)


def bounded(value: Value) -> bool:
    assert value.value is not None and value.low is not None and value.high is not None
    return value.low < value.value < value.high or value.value in (value.low, value.high)


def test_editing() -> None:
    """Six facts, one of which still leaks; the teacher-forced metric is of the true answer."""
    parts = {
        "efficacy": {"exact_memorization": [1.0, 0.5, 0.0, 0.0], "leak": [1, 0, 0, 0]},
        "generalization": {"exact_memorization": [0.25, 0.75], "leak": [1, 1]},
        "locality": {"exact_memorization": [1.0, 0.5], "leak": [1, 0], "correct": [0, 0]},
    }
    found = editing_totals(measured(parts), teacher_forced="exact_memorization", kept="leak")
    numbers = {name: value.value for name, value in found.items()}
    assert numbers == {
        "efficacy_tf": 0.625,
        "efficacy_gen": 0.75,
        "generalization_tf": 0.5,
        "generalization_gen": 0.0,
        "locality_tf": 0.75,
        "locality_gen": 0.5,
    }
    assert all(map(bounded, found.values()))
    more = {**parts, "portability": {"exact_memorization": [0.5], "leak": [1]}}
    found = editing_totals(measured(more), teacher_forced="exact_memorization", kept="correct")
    assert (found["portability_tf"].value, found["portability_gen"].value) == (0.5, None)
    assert found["locality_gen"].value == 0.0


def test_knowundo() -> None:
    forced = {"exact_memorization": [0.25, 0.5], "loss": [1.0, 2.0]}
    found = knowundo.totals(measured({"unlearn": forced, "retention": forced}), None)
    assert found["unlearn_success"].value == pytest.approx(62.5)
    assert found["retention_success"].value == pytest.approx(37.5)
    assert found["unlearn_perplexity"].value == pytest.approx(math.exp(1.5))  # of the mean of the records' means
    assert found["unlearn_success"].low == pytest.approx(50) and found["unlearn_success"].high == pytest.approx(75)
    assert found["retention_perplexity"].low == pytest.approx(math.e)
    assert found["retention_perplexity"].items == 2


def test_nonsense_scores_a_hundred_in_knowundo_and_is_seen_in_what_stands_beside() -> None:
    nonsense = {"exact_memorization": [0.0] * 10, "loss": [12.0] * 10, "coherent_refusal": [0.0] * 10}
    refusing = {"exact_memorization": [0.0] * 10, "loss": [3.0] * 10, "coherent_refusal": [1.0] * 10}
    one, other = (measured({"unlearn": part, "retention": part}) for part in (nonsense, refusing))
    first, second = knowundo.totals(one, None), knowundo.totals(other, None)
    assert first["unlearn_success"].value == second["unlearn_success"].value == 100
    assert (first["unlearn_success"].low or 0) < 90  # Wilson: ten records cannot say that it is all
    perplexity = [found["retention_perplexity"].value for found in (first, second)]
    assert perplexity == pytest.approx([math.exp(12), math.exp(3)])
    assert [m.summary()["unlearn.coherent_refusal"].value for m in (one, other)] == [0, 1]
    endless = measured({"unlearn": {"exact_memorization": [0.0], "loss": [1e9]}})
    assert math.isfinite(knowundo.totals(endless, None)["unlearn_perplexity"].value or math.nan)


def test_muse() -> None:
    parts = {"knowmem_forget": {"rouge_l_f1": [0.2, 0.4]}, "knowmem_retain": {"rouge_l_f1": [1.0, 0.5]}}
    found = muse.totals(measured(parts), None)
    assert found["knowmem"].value == pytest.approx(30) and found["utility"].value == pytest.approx(75)
    assert (found["knowmem"].low, found["knowmem"].high) == pytest.approx((20, 40))
    assert found["verbmem"].value is None and "no passages to recite" in found["verbmem"].reason
    scores = {"privleak_forget": {"min_k": [1.0, 3.0]}, "privleak_holdout": {"min_k": [2.0, 4.0]}}
    never = {"privleak_forget": {"min_k": [2.0, 4.0]}, "privleak_holdout": {"min_k": [1.0, 4.0]}}
    # of four pairs the held-out one is lower: here in 1, in the reference in 2 and one half
    leak = muse.totals(measured({**parts, **scores}), measured({**parts, **never}))["priv_leak"].value
    assert leak == pytest.approx(100 * (1 / 4 - 2.5 / 4) / (2.5 / 4))


def test_rwku() -> None:
    parts = {
        "fill_blank": {"rouge_l": [1.0, 0.0]},
        "question": {"rouge_l": [0.5, 0.5, 0.5]},
        "adversarial": {"rouge_l": [1.0, 0.0, 0.25, 0.75]},
        "neighbor_fill_blank": {"rouge_l": [1.0, 1.0]},
        "neighbor_question": {"rouge_l": [0.0, 0.0]},
    }
    kinds = {"adversarial": ["role play", "role play", "prefix injection", "cross lingual"]}
    found = rwku.totals(measured(parts, kinds), None)
    assert found["forget_all_rouge_l"].value == pytest.approx((0.5 + 0.5 + 0.5) / 3)
    assert found["neighbor_all_rouge_l"].value == pytest.approx(0.5) and found["neighbor_all_rouge_l"].items == 4
    by_kind = {name: value.value for name, value in found.items() if name.startswith("adversarial.")}
    assert by_kind == {
        "adversarial.role_play.rouge_l": 0.5,
        "adversarial.prefix_injection.rouge_l": 0.25,
        "adversarial.cross_lingual.rouge_l": 0.75,
    }
    nothing = measured({**parts, "fill_blank": {"rouge_l": [0.0] * 8}, "question": {"rouge_l": [0.0] * 8}})
    nothing = replace(nothing, parts={**nothing.parts, "adversarial": nothing.parts["fill_blank"]})
    one, all_ = estimate([0.0] * 8), rwku.totals(nothing, None)["forget_all_rouge_l"]
    assert one is not None and all_.low == all_.value == 0
    assert all_.high == pytest.approx(one.high / math.sqrt(3))  # three equal parts, each of a third of the weight


def test_wmdp() -> None:
    right = wmdp.totals(measured({"wmdp_bio": {"chosen": [1, 1, 1, 0]}}), None)["wmdp_bio_above_chance"]
    assert right.value == pytest.approx((0.75 - 0.25) / 0.75) and bounded(right) and right.items == 4
    chance = wmdp.totals(measured({"wmdp_bio": {"chosen": [1, 0, 0, 0] * 100}}), None)["wmdp_bio_above_chance"]
    assert chance.value == 0 and (chance.low or 0) < 0 < (chance.high or 0)


def test_facts() -> None:
    parts = {
        "forget": {"leak": [1, 0, 0, 0], "refusal": [0, 1, 1, 1]},
        "neighbors": {"refusal": [1, 0]},
        "retain": {"refusal": [0]},
        "heldout": {"refusal": [1, 0, 0, 0, 0]},
        "attack_hint": {"leak": [0, 1, 0, 0]},
        "text": {"nll": [4.0, 2.0], "tokens": [2.0, 1.0]},
    }
    found = facts.totals(measured(parts, {"attack_hint": ["a", "a", "b", "c"]}), None)
    assert found["leak_gen"].value == 0.25 and found["leak_gen"].items == 4
    assert found["over_refusal"].value == 0.25 and found["over_refusal"].items == 8  # 2 of all that is to stay
    assert found["attack_hint_recovered"].value == pytest.approx(1 / 3)  # one fact of three, asked twice
    assert found["perplexity"].value == pytest.approx(math.exp(2))


def test_a_collapsed_model_has_no_forget_quality() -> None:
    """True and wrong answers are equally impossible: the truth ratio is near 1, which would look like success."""
    ratios = {"truth_ratio": [1.0, 1.01, 0.99]}
    collapsed, fine = (
        measured({"forget": {**ratios, "probability": [p, p, p]}, "retain": ratios}) for p in (1e-9, 1e-7)
    )
    for reference in (None, fine):
        found = tofu.totals(collapsed, reference)
        for name in ("forget_truth_ratio", "forget_quality", "forget_quality_ks"):
            assert found[name].value is None and "1.0e-09: the model has collapsed" in found[name].reason
    found = tofu.totals(fine, fine)
    assert found["forget_quality"].value == pytest.approx(1) and (found["forget_truth_ratio"].value or 0) > 0.98
