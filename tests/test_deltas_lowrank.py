"""The delta in memory: applying, restoring, negating, composing, taking facts out, norms, gain."""

from __future__ import annotations

import delta_samples as samples
import pytest
import tiny
import torch
from torch import nn

from editunlearn.deltas.arithmetic import merged_weight, weight_sha256
from editunlearn.deltas.build import make_delta, with_gain
from editunlearn.deltas.files import check_base
from editunlearn.deltas.gain import gain_warnings, measure, realised_gain
from editunlearn.deltas.lowrank import Factors, LowRankDelta, compose
from editunlearn.deltas.manifest import hash_id
from editunlearn.errors import InputError, NumericalError, StaleError, UnsupportedError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", samples.TYPES)
def test_applied_changes_logits_and_restores_bit_exactly(kind: str, dtype: torch.dtype) -> None:
    lm = tiny.lm(kind, dtype=dtype)
    delta = samples.delta(lm)
    before, parameters = samples.snapshot(lm.model), dict(lm.model.named_parameters())
    plain = samples.logits(lm.model)
    with delta.applied(lm) as same:
        assert same is lm
        assert not torch.equal(samples.logits(lm.model), plain)
        for name, factors in delta.factors.items():
            changed = lm.layout.read_weight(lm.model, name)
            key = f"{name}.weight"
            base = before[key].t() if lm.layout.is_transposed(lm.model, name) else before[key]
            expected = (base.float() + factors.left @ factors.right).to(dtype)
            assert torch.equal(changed, expected)
    samples.assert_same(lm.model, before)
    after = dict(lm.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert torch.equal(samples.logits(lm.model), plain)


def test_applied_restores_after_an_exception_and_after_training_inside() -> None:
    lm = tiny.lm("gpt2")
    delta, before = samples.delta(lm), samples.snapshot(lm.model)
    with pytest.raises(RuntimeError, match="inside"), delta.applied(lm):
        for name in delta.factors:
            lm.layout.read_weight(lm.model, name).zero_()
        raise RuntimeError("inside")
    samples.assert_same(lm.model, before)


def test_a_delta_that_fits_only_in_part_changes_nothing() -> None:
    lm, other = tiny.lm("llama"), tiny.lm("llama", layers=1)
    delta, before = samples.delta(lm), samples.snapshot(other.model)
    with pytest.raises(InputError, match=r"no module 'model\.layers\.2"), delta.applied(other):
        pass
    samples.assert_same(other.model, before)
    wider = tiny.lm("llama", hidden=48)
    with pytest.raises(InputError) as caught, delta.applied(wider):
        pass
    assert len(caught.value.problems) == 2
    assert "32 x 88" in caught.value.problems[0]


def test_a_model_without_weights_is_refused() -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm)
    lm.model.to("meta")
    with pytest.raises(UnsupportedError, match="on the meta device"), delta.applied(lm):
        pass
    with pytest.raises(UnsupportedError, match="on the meta device"):
        samples.delta_of_packed(lm, delta.factors)


def test_nested_deltas_add_up_and_unwind_in_order() -> None:
    lm = tiny.lm("llama")
    first, second = samples.delta(lm, seed=1), samples.delta(lm, seed=2)
    plain = samples.logits(lm.model)
    with first.applied(lm):
        one = samples.logits(lm.model)
        with second.applied(lm):
            both = samples.logits(lm.model)
        assert torch.equal(samples.logits(lm.model), one)
    assert torch.equal(samples.logits(lm.model), plain)
    joined = compose(first, second)
    assert joined.rank == 8
    with joined.applied(lm):
        assert torch.allclose(samples.logits(lm.model), both, atol=1e-4)


def test_a_tied_weight_stays_as_it_is() -> None:
    lm = tiny.lm("llama")
    name = "model.layers.0.mlp.down_proj"
    twin = nn.Linear(lm.layout.read_weight(lm.model, name).shape[1], 32, bias=False)
    twin.weight = lm.layout.module(lm.model, name).weight
    before = twin.weight.detach().clone()
    with samples.delta(lm).applied(lm):
        assert torch.equal(twin.weight, before)
        assert lm.layout.module(lm.model, name).weight is not twin.weight
    assert lm.layout.module(lm.model, name).weight is twin.weight


def test_applied_with_a_dtype_shows_the_rounding_of_storing_in_it() -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm)
    name, factors = next(iter(delta.factors.items()))
    weight = lm.layout.read_weight(lm.model, name)
    with delta.applied(lm, dtype=torch.bfloat16):
        now = lm.layout.read_weight(lm.model, name)
        assert now.dtype == torch.float32
        assert torch.equal(now, (weight + factors.left @ factors.right).bfloat16().float())


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' class, which the layout tells by its name."""


def test_a_quantised_module_gets_the_product_added_to_its_output() -> None:
    lm = tiny.lm("llama")
    plain = samples.logits(lm.model)
    dense = samples.delta(lm)
    with dense.applied(lm):
        expected = samples.logits(lm.model)
    for site in lm.layout.sites([0, 2]):
        lm.layout.module(lm.model, site.name).__class__ = Linear4bit
    delta = samples.delta_of_packed(lm, dense.factors)
    assert delta.manifest.sites[site.name].base_norm is None
    assert delta.norms()[site.name] is None
    before = samples.snapshot(lm.model)
    with delta.applied(lm):
        samples.assert_same(lm.model, before)
        assert torch.allclose(samples.logits(lm.model), expected, atol=1e-4)
    assert torch.equal(samples.logits(lm.model), plain)


def test_norms_are_those_of_the_dense_update() -> None:
    lm = tiny.lm("gpt2")
    delta = samples.delta(lm, scale=0.05)
    for name, factors in delta.factors.items():
        dense = (factors.left.double() @ factors.right.double()).norm().item()
        assert factors.norm() == pytest.approx(dense, rel=1e-9)
        assert delta.norms()[name] == pytest.approx(0.05, rel=1e-5)
        assert delta.norms(lm)[name] == pytest.approx(0.05, rel=1e-5)
    assert delta.nbytes == sum(4 * (f.left.numel() + f.right.numel()) for f in delta.factors.values())


def test_negated_undoes_the_delta() -> None:
    lm = tiny.lm("gpt_neox")
    delta = samples.delta(lm)
    back = delta.negated()
    assert back.manifest.negated
    assert not back.negated().manifest.negated
    plain = samples.logits(lm.model)
    with delta.applied(lm), back.applied(lm):
        assert torch.allclose(samples.logits(lm.model), plain, atol=1e-4)


def test_without_drops_the_columns_of_single_facts_and_keeps_the_others_bit_for_bit() -> None:
    lm = tiny.lm("llama")
    per_module = {
        "model.layers.0.mlp.down_proj": ["ada-1", "bob-1", "ada-1", None],
        "model.layers.2.mlp.down_proj": ["ada-1", "ada-1", "ada-1", "ada-1"],
    }
    delta = samples.delta(lm, columns=per_module, store_facts=True)
    name = "model.layers.0.mlp.down_proj"
    kept = delta.without(["ada-1"])
    assert list(kept.factors) == [name]
    assert torch.equal(kept.factors[name].left, delta.factors[name].left[:, [1, 3]])
    assert torch.equal(kept.factors[name].right, delta.factors[name].right[[1, 3]])
    salt = delta.manifest.facts[0].salt
    assert kept.columns == {name: (hash_id("bob-1", salt), None)}
    assert kept.manifest.fact_count == 3
    assert "ada-1" not in kept.manifest.model_dump_json()
    assert kept.manifest.sites[name].gain is None
    assert kept.manifest.sites[name].norm == pytest.approx(kept.factors[name].norm())
    untouched = delta.without(["bob-1"])
    assert untouched.factors["model.layers.2.mlp.down_proj"] is delta.factors["model.layers.2.mlp.down_proj"]
    with pytest.raises(InputError, match=r"for 'zed', 'ada-1'; it knows 1 fact ids"):
        kept.without(["zed", "ada-1"])


def test_without_finds_facts_of_both_parts_of_a_composed_delta() -> None:
    lm = tiny.lm("llama")
    joined = compose(samples.delta(lm, seed=1), samples.delta(lm, seed=2))
    kept = joined.without(["ada-1"])
    assert kept.rank == 6
    assert kept.manifest.fact_count == 6
    assert kept.manifest.hparams == joined.manifest.hparams


def test_compose_refuses_other_weights_unless_sequential() -> None:
    lm = tiny.lm("llama")
    first = samples.delta(lm, seed=1)
    with first.applied(lm):
        second = samples.delta(lm, seed=2)
    with pytest.raises(StaleError, match="sequential=True"):
        compose(first, second)
    joined = compose(first, second, sequential=True)
    assert joined.manifest.sites.keys() == first.manifest.sites.keys()
    assert (
        joined.manifest.sites[next(iter(joined.factors))].base_sha256
        == first.manifest.sites[next(iter(joined.factors))].base_sha256
    )
    with pytest.raises(InputError, match="gpt2"):
        compose(samples.delta(tiny.lm("gpt2")), first)
    with pytest.raises(InputError, match="reverts"):
        compose(first, first.negated())


def test_manifest_of_a_new_delta() -> None:
    lm = tiny.lm("gpt2")
    manifest = samples.delta(lm).manifest
    site = manifest.sites["transformer.h.0.mlp.c_proj"]
    assert manifest.base.name == "tiny-gpt2"
    assert manifest.base.model_type == "gpt2"
    assert site.transposed
    assert site.shape == (32, 88)
    assert site.base_dtype == site.gain_dtype == "float32"
    assert site.gain == pytest.approx(1.0, abs=1e-4)
    assert manifest.versions.keys() == {"editunlearn", "python", "torch", "transformers"}
    text = manifest.model_dump_json()
    assert "ada-1" not in text
    assert "secret" not in text
    assert manifest.facts[0].salt == samples.delta(lm).manifest.facts[0].salt  # the same run writes the same bytes


def test_bad_input_to_a_new_delta() -> None:
    lm = tiny.lm("llama")
    with pytest.raises(ValueError, match="not ids"):
        samples.delta(lm, columns=["ada-1", "bob-1", "cyd-1", "nobody"])
    with pytest.raises(ValueError, match="3 column ids for rank 4"):
        samples.delta(lm, columns=["ada-1", "bob-1", "cyd-1"])
    name = lm.layout.site(0).name
    bad = Factors(torch.full((32, 1), torch.nan), torch.ones(1, 88))
    with pytest.raises(NumericalError, match=r"down_proj\.left"):
        make_delta(
            lm,
            {name: bad},
            method="rome",
            hparams={},
            facts=[],
            columns=[None],
            target_strategy="empty",
            seeds={},
        )
    with pytest.raises(ValueError, match="must be"):
        Factors(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="float32"):
        Factors(torch.ones(3, 2).double(), torch.ones(2, 3).double())
    delta = samples.delta(lm)
    with pytest.raises(ValueError, match="manifest describes"):
        LowRankDelta(dict(list(delta.factors.items())[:1]), delta.manifest)


def test_gain_is_one_for_large_and_small_for_tiny_changes_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).bfloat16()
    left, right = torch.randn(256, 8, generator=generator), torch.randn(8, 512, generator=generator)

    def at(relative: float) -> Factors:
        scale = relative * weight.float().norm() / Factors(left, right).norm()
        return Factors(left * scale, right)

    large, small = (realised_gain(weight, at(size), torch.bfloat16) for size in (0.03, 0.001))
    assert large.gain == pytest.approx(1.0, abs=0.01)
    assert small.gain == pytest.approx(0.54, abs=0.04)  # as in the reference table
    assert small.norm == pytest.approx(0.001, rel=1e-3)
    merged = merged_weight(weight, at(0.001).left, at(0.001).right)
    dense = (at(0.001).left @ at(0.001).right).double()
    arrived = merged.double() - weight.double()
    assert small.gain == pytest.approx(float((arrived * dense).sum() / dense.square().sum()), rel=1e-9)
    assert small.error == pytest.approx(float((arrived - dense).norm() / dense.norm()), rel=1e-9)
    exact = realised_gain(weight, at(0.001), torch.float32)
    assert exact.gain == pytest.approx(1.0, abs=1e-4)
    lines = gain_warnings({"a.b": small, "c.d": large})
    assert len(lines) == 1
    assert f"{small.gain:.0%} of its intended effect" in lines[0]
    assert "--save lora" in lines[0]
    assert "float32" in lines[0]
    zero = realised_gain(weight, Factors(left * 0, right), torch.bfloat16)
    assert (zero.gain, zero.error) == (1.0, 0.0)


def test_gain_streams_rows_and_sees_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("gpt2", dtype=torch.bfloat16)
    delta = samples.delta(lm, scale=0.01)
    whole = measure(lm, delta)
    monkeypatch.setattr("editunlearn.deltas.arithmetic.ROWS", 5)
    pieces = measure(lm, delta)
    assert whole.keys() == delta.factors.keys()
    for name in whole:
        assert pieces[name].gain == pytest.approx(whole[name].gain, rel=1e-4)
    again = with_gain(lm, delta, torch.float16)
    assert again.manifest.sites[next(iter(whole))].gain_dtype == "float16"
    half = tiny.lm("llama", dtype=torch.float16)
    with pytest.raises(NumericalError, match=r"layers\.0.*float16"):
        samples.delta(half, scale=1e6)


def test_weight_hash_is_of_values_not_of_the_dtype_they_are_held_in(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    narrow = weight.bfloat16()
    assert weight_sha256(narrow) == weight_sha256(narrow.float())
    assert weight_sha256(narrow) != weight_sha256(weight)
    assert weight_sha256(weight, made_in="bfloat16") == weight_sha256(narrow)
    assert weight_sha256(weight.t().contiguous().t()) == weight_sha256(weight)
    assert weight_sha256(weight.t()) != weight_sha256(weight)
    assert weight_sha256(weight.double()) != weight_sha256(weight)
    assert weight_sha256(weight.double(), made_in="float32") == weight_sha256(weight)
    packed = torch.arange(10, dtype=torch.uint8)
    assert weight_sha256(packed) != weight_sha256(packed + 1)
    whole = weight_sha256(weight)
    monkeypatch.setattr("editunlearn.deltas.arithmetic.ROWS", 2)
    assert weight_sha256(weight) == whole


class _Packed(nn.Module):
    """Stands in for a GPTQ layer: no ``weight``, integers in ``qweight``."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.dense = dense
        self.bits = 4
        self.register_buffer("qweight", torch.arange(12, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x)


def test_a_packed_module_without_a_weight_is_hashed_and_changed_through_its_output() -> None:
    lm = tiny.lm("llama")
    dense = samples.delta(lm)
    with dense.applied(lm):
        expected = samples.logits(lm.model)
    for layer in (0, 2):
        mlp = lm.model.model.layers[layer].mlp
        mlp.down_proj = _Packed(mlp.down_proj)
    delta = samples.delta_of_packed(lm, dense.factors)
    check_base(delta, lm)
    with delta.applied(lm):
        assert torch.allclose(samples.logits(lm.model), expected, atol=1e-4)
    lm.model.model.layers[2].mlp.down_proj.qweight[0] = 5
    with pytest.raises(StaleError, match=r"layers\.2"):
        check_base(delta, lm)


def test_three_runs_composed_keep_all_their_seeds_and_settings() -> None:
    lm = tiny.lm("llama")
    runs = []
    for seed in (1, 2, 3):
        run = samples.delta(lm, seed=seed)
        changes = {"seeds": {"seed": seed}, "hparams": {"ridge": seed}}
        runs.append(LowRankDelta(run.factors, run.manifest.model_copy(update=changes)))
    manifest = compose(compose(runs[0], runs[1]), runs[2]).manifest
    assert manifest.seeds == {"seed": 1, "seed.2": 2, "seed.3": 3}
    assert [part["ridge"] for part in manifest.parts()] == [1, 2, 3]
    assert manifest.method == "memit"
    assert manifest.fact_count == 12
