"""Dense deltas: the same invariants as low-rank ones, and what each kind can do that the other cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import delta_samples as samples
import pytest
import tiny
import torch

from editunlearn.deltas import kinds
from editunlearn.deltas.card import model_card
from editunlearn.deltas.dense import DenseDelta, make_dense, scaled
from editunlearn.deltas.files import check_base, load, load_manifest, save
from editunlearn.deltas.lora import export_lora
from editunlearn.deltas.lowrank import Dense, LowRankDelta
from editunlearn.deltas.merge import merge, merge_folder
from editunlearn.errors import InputError, NumericalError, StaleError, UnsupportedError
from editunlearn.evaluation.attacks.quantisation import quantised
from editunlearn.evaluation.attacks.subspace import ablated, written_directions

ABOUT: dict[str, Any] = {
    "method": "npo",
    "hparams": {"beta": 0.1},
    "facts": samples.facts(),
    "target_strategy": "refusal",
    "seeds": {"seed": 0},
}


def dense(lm: Any, low: LowRankDelta | None = None, **about: Any) -> DenseDelta:
    """The dense form of a random low-rank delta."""
    low = low or samples.delta(lm)
    changes = {name: Dense(f.left @ f.right) for name, f in low.factors.items()}
    return make_dense(lm, changes, **{**ABOUT, **about})


@pytest.mark.parametrize("kind", samples.TYPES)
def test_applied_is_the_low_rank_delta_and_restores_bit_for_bit(kind: str) -> None:
    lm = tiny.lm(kind)
    before, low = samples.snapshot(lm.model), samples.delta(lm)
    plain = samples.logits(lm.model)
    with low.applied(lm):
        expected = samples.logits(lm.model)
    with dense(lm, low).applied(lm):
        torch.testing.assert_close(samples.logits(lm.model), expected)
    assert not torch.allclose(plain, expected)
    samples.assert_same(lm.model, before)
    with pytest.raises(RuntimeError, match="on purpose"), dense(lm, low).applied(lm):
        raise RuntimeError("on purpose")
    samples.assert_same(lm.model, before)


def test_save_and_load_are_exact_and_the_same_bytes_again(tmp_path: Path) -> None:
    lm = tiny.lm()
    delta = dense(lm)
    manifest = save(delta, tmp_path / "a")
    again = load(tmp_path / "a", lm)
    assert isinstance(again, DenseDelta) and again.manifest == manifest
    for name, change in delta.factors.items():
        assert torch.equal(change.left, again.factors[name].left)
    save(again, tmp_path / "b")
    for name in ("delta.safetensors", "delta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    raw = json.loads((tmp_path / "a" / "delta.json").read_text())
    assert raw["kind"] == "dense" and raw["method"] == "npo"
    (site, *_) = raw["sites"].values()
    assert site["changed"] == site["shape"][0] * site["shape"][1] and site["gain"] == pytest.approx(1.0)
    assert "Darrieux" not in (tmp_path / "a" / "delta.json").read_text()
    with pytest.raises(StaleError, match="other weights"):
        check_base(again, tiny.lm(seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_in_memory_and_on_disk_is_applied(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = tiny.lm(dtype=dtype)
    lm.model.save_pretrained(tmp_path / "base")
    delta = dense(lm)
    with delta.applied(lm):
        expected = samples.logits(lm.model)
    report = merge(lm, delta)
    assert torch.equal(samples.logits(lm.model), expected)
    assert all(found.gain > 0.9 for found in report.values())
    merge_folder(tmp_path / "base", delta, tmp_path / "merged")
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "merged" / "model.safetensors")
    for name in delta.factors:
        assert torch.equal(weights[f"{name}.weight"], lm.layout.read_weight(lm.model, name))


def test_reverting_a_merge(tmp_path: Path) -> None:
    lm = tiny.lm()
    before = samples.snapshot(lm.model)
    delta = dense(lm)
    merge(lm, delta)
    merge(lm, delta.negated())
    for name, tensor in lm.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)
    save(delta.negated(), tmp_path)
    assert load_manifest(tmp_path).negated
    with pytest.raises(StaleError, match="nothing to revert"):
        check_base(delta.negated(), tiny.lm())


def test_composing_adds_changes_of_both_kinds(tmp_path: Path) -> None:
    lm = tiny.lm()
    low, other = samples.delta(lm), dense(lm, samples.delta(lm, seed=4, layers=(1, 2)))
    for first, second in ((low, other), (other, low), (other, dense(lm, low))):
        both = kinds.compose(first, second)
        assert isinstance(both, DenseDelta)
        parts = [
            {n: f.left @ f.right if f.right is not None else f.left for n, f in d.factors.items()}
            for d in (first, second)
        ]
        for name, change in both.factors.items():
            torch.testing.assert_close(change.left, sum(part[name] for part in parts if name in part))
        assert both.manifest.fact_count == 2 * len(samples.IDS)
        save(both, tmp_path / "both")
        assert load(tmp_path / "both").manifest.kind == "dense"
    with pytest.raises(StaleError, match="different weights"):
        kinds.compose(low, dense(tiny.lm(seed=1)))


def test_single_facts_cannot_be_taken_out() -> None:
    lm = tiny.lm()
    delta = dense(lm)
    assert delta.without([]) is delta
    with pytest.raises(UnsupportedError, match="all 4 facts were learned together.*'ada-1'"):
        delta.without(["ada-1"])


def test_as_a_lora_the_part_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = tiny.lm()
    delta = dense(lm, samples.delta(lm, rank=4))
    made = export_lora(delta, tmp_path / "exact", lm.name, lm=lm)
    assert not made.discarded
    with delta.applied(lm):
        expected = samples.logits(lm.model)
    lm.model.save_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(lm.model, tmp_path / "exact")
    torch.testing.assert_close(samples.logits(adapted), expected, rtol=1e-4, atol=1e-4)
    lm = tiny.lm()
    wide = dense(lm, samples.delta(lm, rank=30))
    cut = export_lora(wide, tmp_path / "cut", lm.name, lm=lm, max_rank=8)
    assert cut.discarded and all(0.1 < share < 0.9 for share in cut.discarded.values())


def test_attacks_on_weights_take_it() -> None:
    lm = tiny.lm()
    before, low = samples.snapshot(lm.model), samples.delta(lm, rank=2)
    delta = dense(lm, low)
    for change, factors in zip(delta.factors.values(), low.factors.values(), strict=True):
        ours, theirs = written_directions(change.left, None, 2), written_directions(factors.left, factors.right, 5)
        assert ours.shape[1] == theirs.shape[1] == 2
        torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-4, atol=1e-4)
    found = []
    for made in (low, delta):
        with ablated(lm, made, 1):
            first = samples.logits(lm.model)
        with quantised(lm, "int8", made):
            found.append((first, samples.logits(lm.model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    samples.assert_same(lm.model, before)


def test_beside_a_quantised_module_the_change_is_added_to_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from editunlearn.deltas import lowrank

    lm = tiny.lm()
    delta = dense(lm)
    with delta.applied(lm):
        expected = samples.logits(lm.model)
    monkeypatch.setattr(lowrank, "quantisation", lambda *_: "4-bit (nf4)")
    monkeypatch.setattr(lowrank, "shape", lambda _, name: delta.factors[name].shape)
    monkeypatch.setattr(lowrank, "stored_weight", lambda *_: torch.zeros(1))
    with delta.applied(lm):
        torch.testing.assert_close(samples.logits(lm.model), expected, rtol=1e-4, atol=1e-4)


def test_bad_changes_are_refused() -> None:
    lm = tiny.lm()
    (name, _), *_ = samples.delta(lm).factors.items()
    with pytest.raises(NumericalError, match="not finite"):
        make_dense(lm, {name: Dense(torch.full((32, 88), torch.nan))}, **ABOUT)
    with pytest.raises(InputError, match="32 x 88"):
        make_dense(lm, {name: Dense(torch.zeros(32, 87))}, **ABOUT)
    with pytest.raises(ValueError, match="float32"):
        Dense(torch.zeros(2, 2, dtype=torch.float64))
    delta = dense(lm)
    with pytest.raises(ValueError, match="manifest describes"):
        DenseDelta({}, delta.manifest)


def test_the_card_says_what_changed() -> None:
    lm = tiny.lm()
    delta = dense(lm)
    half = {n: Dense(c.left * (torch.arange(c.shape[1]) % 2)) for n, c in delta.factors.items()}
    made = make_dense(lm, half, **ABOUT)
    card = model_card(made.manifest, None, [], kind="delta")
    numbers = sum(c.left.numel() for c in half.values())
    assert f"{numbers // 2:,} of their {numbers:,} entries" in card
    assert "| full |" in card and "without single facts" not in card
    assert made.count == numbers // 2


def test_scaled_measures_its_norm_anew() -> None:
    delta = dense(tiny.lm())
    twice = scaled(delta, -2.0)
    for name, site in twice.manifest.sites.items():
        assert site.norm == pytest.approx(2 * delta.manifest.sites[name].norm) and site.gain is None
