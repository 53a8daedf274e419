"""The quantisation attack: which weights it rounds, that the delta is in them, and that all is restored."""

from __future__ import annotations

import delta_samples as samples
import pytest
import tiny
import torch

from editunlearn.deltas.merge import merge
from editunlearn.errors import InputError
from editunlearn.evaluation.attacks.quantisation import SCHEMES, linear_maps, quantised


@pytest.mark.parametrize("kind", samples.TYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_edited_model_is_rounded_and_restored(kind: str, scheme: str) -> None:
    lm = tiny.lm(kind)
    before = samples.snapshot(lm.model)
    delta = samples.delta(lm)
    with quantised(lm, scheme, delta):
        rounded, found = samples.snapshot(lm.model), samples.logits(lm.model)
    assert all(torch.equal(a, b) for a, b in zip(samples.snapshot(lm.model).values(), before.values(), strict=True))
    merge(lm, delta)
    exact = samples.logits(lm.model)
    names = linear_maps(lm)
    assert len(names) >= 3 * 4 and not any("head" in name or "embed" in name for name in names)
    for name, weight in rounded.items():
        merged = lm.model.state_dict()[name]
        own = name.removesuffix(".weight") in names
        assert torch.equal(weight, merged) != own or scheme == "bf16", name
        assert float((weight - merged).float().norm()) <= 0.15 * float(merged.float().norm())
    assert float((found - exact).norm()) < 0.6 * float(exact.norm())


def test_more_bits_are_nearer() -> None:
    lm = tiny.lm("llama")
    plain = samples.logits(lm.model)
    off = {}
    for scheme in SCHEMES:
        with quantised(lm, scheme):
            off[scheme] = float((samples.logits(lm.model) - plain).norm())
    assert off["bf16"] < off["int8"] < off["nf4"] < off["int4"]


def test_bad_scheme_and_an_exception_inside() -> None:
    lm = tiny.lm("llama")
    before = samples.logits(lm.model)
    with pytest.raises(InputError, match=r"unknown quantisation 'nf5'. Did you mean 'nf4'\?"), quantised(lm, "nf5"):
        pass
    with pytest.raises(RuntimeError), quantised(lm, "int4"):
        raise RuntimeError
    assert torch.equal(samples.logits(lm.model), before)
