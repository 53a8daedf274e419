"""The numbers that a comparison makes of its runs, by hand."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from editunlearn import methods
from editunlearn.comparing import sweep, views
from editunlearn.comparing.meter import Budget, Meter, OverBudget
from editunlearn.comparing.views import Point
from editunlearn.errors import InputError
from editunlearn.hparams import load_hparams


def made(trial: int, leak: float, kept: float, perplexity: float = 10.0) -> Point:
    return Point("a", trial, 0, leak, kept, perplexity)


def test_score_selection_and_matched_forgetting() -> None:
    assert made(0, 0.2, 0.4).score == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert made(0, 0.0, 0.0).score == 0 and made(0, 1.0, 1.0).score == 0  # a ruined model, an untouched one
    points = [made(0, 0.0, 0.5), made(1, 0.1, 0.9), made(2, 0.04, 0.6), made(3, 0.1, 0.9, 9.0)]
    best, level = views.best(points), views.matched(points, 0.05)
    assert best is not None and best.trial == 3  # as good as 1, with the lower perplexity
    assert level is not None and level.trial == 2
    assert views.matched(points[1:2], 0.05) is None and views.best([]) is None


def test_a_point_is_made_of_what_was_measured() -> None:
    summary = {
        "forget.leak": {"value": 0.0},
        "distracted.leak": {"value": 0.5},
        "paraphrases.leak": {"value": None},
        "neighbors.correct": {"value": 1.0},
        "heldout.correct": {"value": 0.5},
        "retain.correct": {"value": 0.0},
    }
    found = views.point("a", 1, 2, summary)
    assert (found.leak, found.kept, found.perplexity) == (0.25, 0.75, math.inf)
    del summary["neighbors.correct"], summary["heldout.correct"]
    assert views.point("a", 1, 2, summary).kept == 0.0  # only then the facts that methods saw


def test_the_front() -> None:
    points = [(1.0, 1.0), (0.0, 0.5), (0.5, 0.5), (0.2, 0.8), (0.0, 0.5), (0.2, 0.7)]
    assert views.on_front(points) == [True, True, False, True, True, False]


def test_means_over_seeds() -> None:
    found = views.over_seeds([0.1, 0.2, 0.3])
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t(0.975, 2)
    assert found.value == pytest.approx(0.2) and found.low == pytest.approx(0.2 - half) and found.items == 3
    assert found.high == pytest.approx(0.2 + half)
    one = views.over_seeds([0.4])
    assert one.value == 0.4 and one.low is None and "one seed" in one.reason


def test_every_method_gets_as_many_trials_and_its_control() -> None:
    arms = sweep.arms(["memit", "grin", "seven/gradient_ascent", "wise", "alphaedit", "grace"], len(sweep.FACTORS))
    assert [arm.name for arm in arms][:3] == ["memit", "grin", "grin:random"]
    for arm in arms:
        values = [sweep.setting(hp, sweep.strength(hp)) for hp in arm.trials]
        assert len(set(values)) == len(sweep.FACTORS) and values[2] == pytest.approx(3 * values[0])
        assert arm.trials[0].model_dump(exclude={"random"}) == load_hparams(arm.name.split(":")[0]).model_dump(
            exclude={"random"}
        )
    assert [hp.random for hp in arms[2].trials] == [True] * len(sweep.FACTORS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", methods.names())
def test_each_shipped_method_can_be_swept(method: str) -> None:
    assert all(len(arm.trials) == len(sweep.FACTORS) for arm in sweep.arms([method], len(sweep.FACTORS)))


def test_bad_sweeps() -> None:
    with pytest.raises(InputError) as error:
        sweep.arms(["memmit", "npo", "npo"], 0)
    text = str(error.value)
    assert "Did you mean 'memit'" in text and "npo is named twice" in text and "--trials 0: from 1" in text
    with pytest.raises(InputError, match="from 1 .* to 7"):
        sweep.arms(["npo"], 8)


def test_seeds_reach_the_prefixes() -> None:
    hp = sweep.seeded(load_hparams("memit"), 5)
    assert hp.seed == 5 and hp.context_prefixes.seed == 5  # type: ignore[attr-defined]
    assert sweep.seeded(load_hparams("npo"), 5).seed == 5


@pytest.mark.parametrize("text", ["", "wall", "wall:0", "wall:x", "cpu:3", "flops:-1", "wall:inf", "flops:nan"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(InputError, match="wall:SECONDS"):
        Budget.parse(text)


def test_operations_are_counted_forward_and_back() -> None:
    lm = tiny.lm()
    left, right = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    meter = Meter(lm)
    with meter.running():
        (left @ right).sum().backward()  # type: ignore[no-untyped-call]
        lm.model(input_ids=torch.zeros(2, 4, dtype=torch.long))
    alone = Meter(lm)
    with alone.running():
        lm.model(input_ids=torch.zeros(2, 4, dtype=torch.long))
    assert meter.flops - alone.flops == 3 * 2 * 3 * 5 * 7 and meter.tokens == 8
    linear = sum(p.numel() for n, p in lm.model.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert 2 * 8 * linear <= alone.flops <= 1.2 * 2 * 8 * linear  # attention scores are the rest


@pytest.mark.parametrize("budget", [Budget(wall=1e-9), Budget(flops=100)])
def test_a_spent_budget_stops(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget
    lm = tiny.lm()
    meter, after = Meter(lm, budget), []
    with pytest.raises(OverBudget, match="over the budget"), meter.running():
        lm.model(input_ids=torch.zeros(2, 4, dtype=torch.long))
        after.append(1)
    assert not after and meter.seconds > 0
    assert not lm.model.get_input_embeddings()._forward_hooks
