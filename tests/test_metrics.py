"""Metrics against values worked by hand and against literal versions on random data."""

from __future__ import annotations

import math
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from editunlearn.evaluation.metrics import likelihood as tofu
from editunlearn.evaluation.metrics import memorisation as mem
from editunlearn.evaluation.metrics import text
from editunlearn.evaluation.metrics.glossary import MODULES
from editunlearn.evaluation.metrics.intervals import estimate

# --- the page


def test_every_definition_is_on_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    for module in MODULES:
        for definition in module.DEFINITIONS:
            assert f"| `{definition.name}` |" in page


# --- text


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (" I don't know, but it is Paris.", "leak"),
        (" I don't know.", "refusal"),
        (" I am sorry, I cannot say.", "refusal"),
        (" ... ", "empty"),
        ("", "empty"),
        (" Lyon, of course", "substitute"),
        (" Nothing to see", "substitute"),
    ],
)
def test_outcome(said: str, found: str) -> None:
    assert text.outcome(said, ["Paris"]) == found


def test_the_target_of_an_edit_counts_as_refusal() -> None:
    assert text.outcome(" Nothing to see here", ["Paris"], "Nothing to see") == "refusal"
    assert text.outcome(" Nothing, Paris", ["Paris"], "Nothing") == "leak"


def test_coherent() -> None:
    assert text.coherent("I don't know.") and text.coherent("No.") and not text.coherent(" ?! ")
    assert not text.coherent("I don't I don't I don't I don't I don't")
    assert text.coherent("the cat sat on the mat and the cat sat there")


def test_names_subject() -> None:
    assert text.names_subject("I know nothing about the Eiffel Tower.", "Eiffel Tower")
    assert text.names_subject("I cannot talk about Darrieux.", "Danielle Darrieux")
    assert not text.names_subject("I don't know.", "Danielle Darrieux")
    assert not text.names_subject("It is of no use", "Of It")  # words shorter than four letters say nothing


def lcs(one: list[str], other: list[str]) -> int:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l() -> None:
    assert text.rouge_l("the cat is on the mat", "the cat sat on the mat", stem=False) == pytest.approx(5 / 6)
    assert text.rouge_l("cats", "the cat") == 0.5 and text.rouge_l("cats", "the cat", stem=False) == 0
    assert text.rouge_l("a b c d", "a b", kind="f1") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert text.rouge_l("", "a") == 0
    draw = random.Random(0)
    for _ in range(50):
        one, other = ([draw.choice("abcdef") for _ in range(draw.randint(1, 12))] for _ in range(2))
        common = lcs(one, other)
        assert text.rouge_l(" ".join(one), " ".join(other), stem=False) == pytest.approx(common / len(other))
        f1 = 2 * common / (len(one) + len(other))
        assert text.rouge_l(" ".join(one), " ".join(other), kind="f1", stem=False) == pytest.approx(f1)


def test_ngram_entropy() -> None:
    assert text.ngram_entropy("word") == 0
    assert text.ngram_entropy("a b") == 0  # one pair
    # four different pairs (2 bits), three different triples (log2 3)
    assert text.ngram_entropy("a b c d e") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert text.ngram_entropy("a a a a a") == 0


# --- likelihood


def test_probabilities() -> None:
    assert tofu.probability(math.log(4)) == pytest.approx(0.25)
    losses = [-math.log(p) for p in (0.2, 0.1, 0.1)]
    assert tofu.probability_among(losses[0], losses[1:]) == pytest.approx(0.5)
    assert tofu.probability_among(2000.0, [2000.0]) == pytest.approx(0.5)  # no underflow
    with pytest.raises(ValueError, match="wrong options"):
        tofu.probability_among(1.0, [])


def test_truth_ratio() -> None:
    wrong = [-math.log(0.4), -math.log(0.1)]
    true = -math.log(0.5)
    assert tofu.truth_ratio(true, wrong) == pytest.approx(0.2 / 0.5)  # sqrt(0.4 * 0.1) = 0.2
    assert tofu.truth_ratio(true, wrong, "arithmetic") == pytest.approx(0.25 / 0.5)
    with pytest.raises(ValueError, match="Means: geometric, arithmetic"):
        tofu.truth_ratio(true, wrong, "harmonic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wrong answers"):
        tofu.truth_ratio(true, [])
    assert tofu.forget_truth_ratio([0.5, 2.0, 1.0]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert tofu.forget_truth_ratio([0.0]) == 0.0
    assert tofu.utility_truth_ratio([0.25, 2.0]) == pytest.approx(0.375)
    assert tofu.forget_truth_ratio([]) is None and tofu.utility_truth_ratio([]) is None


def test_model_utility() -> None:
    assert tofu.model_utility({"a": 0.5, "b": 1.0}) == pytest.approx(2 / 3)
    assert tofu.model_utility({"a": 0.0, "b": 1.0}) == 0
    assert tofu.model_utility({"a": None, "b": 1.0}) is None  # what was not measured is no number
    with pytest.raises(ValueError, match="negative"):
        tofu.model_utility({"a": -0.1})
    with pytest.raises(ValueError, match="no parts"):
        tofu.model_utility({})


def ks(one: Any, other: Any) -> float:
    at = np.concatenate([one, other])
    return float(max(abs((one <= x).mean() - (other <= x).mean()) for x in at))


def test_forget_quality() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=60), draw.normal(0.8, size=50)
    found = tofu.forget_quality(one, other)
    assert found.statistic == pytest.approx(ks(one, other)) and (found.items, found.reference_items) == (60, 50)
    assert found.p_value < 0.01 < tofu.forget_quality(one, one).p_value
    turned = tofu.forget_quality(np.exp(-one), np.exp(-other))  # 1/R
    assert turned.p_value == pytest.approx(found.p_value)
    many = tofu.forget_quality(np.tile(one, 5), np.tile(other, 5))
    assert many.statistic == pytest.approx(found.statistic) and many.p_value < found.p_value / 100
    with pytest.raises(ValueError, match="reference"):
        tofu.forget_quality(one, [])


# --- memorisation


@pytest.mark.parametrize(
    ("predicted", "exact", "strength"),
    [([1, 2, 3, 4], 1, 1), ([9, 2, 3, 4], 0.75, 0.75), ([1, 9, 3, 4], 0.75, 0.5), ([1, 2, 3, 9], 0.75, 0)],
)
def test_memorisation(predicted: list[int], exact: float, strength: float) -> None:
    assert mem.exact_memorization(predicted, [1, 2, 3, 4]) == exact
    assert mem.extraction_strength(predicted, [1, 2, 3, 4]) == strength


def test_extraction_strength_is_the_literal_one() -> None:
    draw = random.Random(1)
    for _ in range(200):
        length = draw.randint(1, 8)
        gold, predicted = ([draw.randint(0, 1) for _ in range(length)] for _ in range(2))
        fewest = next(k for k in range(length + 1) if predicted[k:] == gold[k:])
        assert mem.extraction_strength(predicted, gold) == pytest.approx(1 - fewest / length)
    for wrong in ([], [1, 2]):
        with pytest.raises(ValueError, match="predicted tokens"):
            mem.extraction_strength(wrong, [1] if wrong else [])


def test_membership_scores() -> None:
    log_p = [-1.0, -4.0, -2.0, -3.0, -0.5]
    assert mem.min_k(log_p, 0.4) == pytest.approx(3.5) and mem.min_k(log_p, 0.01) == 4
    assert mem.min_k(log_p, 1.0) == pytest.approx(2.1)
    plus = mem.min_k_plus_plus(log_p, [-2.0] * 5, [0.5] * 5, 0.4)
    assert plus == pytest.approx((4 + 2) / 2)
    assert math.isfinite(mem.min_k_plus_plus([-0.0], [-0.0], [0.0]))
    assert mem.zlib_score(30.0, "aaaa") == pytest.approx(30 / len(zlib.compress(b"aaaa")))
    assert mem.reference_score(2.5, 3.0) == -0.5 and mem.gradient_norm([1.0, 2.0, 6.0]) == 3.0
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        mem.gradient_norm([])
    for wrong in ([], log_p):
        with pytest.raises(ValueError, match="min_k"):
            mem.min_k(wrong, 0.4 if not wrong else 0.0)


def test_membership_is_read_on_both_sides() -> None:
    forget, holdout = [1.0, 2.0, 3.0], [2.0, 4.0]
    pairs = [1.0 if f < h else 0.5 if f == h else 0.0 for f in forget for h in holdout]
    assert mem.membership_auc(forget, holdout) == pytest.approx(sum(pairs) / 6)
    assert mem.membership_auc([0.1, 0.2], [1, 2]) == 1 and mem.membership_auc([5, 6], [1, 2]) == 0
    assert [mem.membership_verdict(a) for a in (0.9, 0.5, 0.1)] == ["memorised", "like the reference", "over-unlearned"]
    assert mem.priv_leak(0.0, 0.5) == -100 and mem.priv_leak(0.5, 0.5) == 0 and mem.priv_leak(0.75, 0.5) == 50
    with pytest.raises(ValueError, match="held-out scores"):
        mem.membership_auc([math.nan], [1.0])
    with pytest.raises(ValueError, match="must be above 0"):
        mem.priv_leak(0.5, 0.0)


# --- intervals


def test_intervals() -> None:
    assert estimate([]) is None
    none = estimate([0.0] * 40)
    assert none is not None and none.value == none.low == 0 and 0.05 < none.high < 0.1  # Wilson: 0.088
    half = estimate([0.0, 1.0] * 50)
    assert (
        half is not None and half.low == pytest.approx(0.404, abs=1e-3) and half.high == pytest.approx(0.596, abs=1e-3)
    )
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(values)
    assert found is not None and found.value == pytest.approx(values.mean())
    spread = 1.96 * values.std() / 20
    assert found.high - found.value == pytest.approx(spread, rel=0.15) and found == estimate(values)
    with pytest.raises(ValueError, match="finite"):
        estimate([math.inf])
