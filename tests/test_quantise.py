"""Quantisation against literal versions, its error, and what it must not change."""

from __future__ import annotations

import pytest
import torch

from editunlearn.numerics.quantise import NF4, nf4, round_to_nearest


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 64, 32])
def test_round_to_nearest_is_the_literal_one(bits: int, group: int | None) -> None:
    w = weight()
    found = round_to_nearest(w, bits, group)
    size = group or 128
    for row in range(6):
        for start in range(0, 128, size):
            part = w[row, start : start + size]
            scale = float(part.abs().max()) / (2 ** (bits - 1) - 1)
            literal = torch.tensor([round(float(x) / scale) * scale for x in part])
            torch.testing.assert_close(found[row, start : start + size], literal)
            assert float((part - literal).abs().max()) <= scale / 2 * 1.0001
    torch.testing.assert_close(round_to_nearest(found, bits, group), found)


def test_nf4_takes_the_nearest_level() -> None:
    w = weight()
    found = nf4(w)
    for row in range(6):
        for start in (0, 64):
            part = w[row, start : start + 64]
            scale = float(part.abs().max())
            literal = torch.tensor([min(NF4, key=lambda level: abs(level - float(x) / scale)) * scale for x in part])
            torch.testing.assert_close(found[row, start : start + 64], literal)
    assert float((found - w).norm() / w.norm()) < 0.1 < float((round_to_nearest(w, 3) - w).norm() / w.norm())


@pytest.mark.parametrize("how", [lambda w: round_to_nearest(w, 8), nf4])
def test_shape_dtype_and_zeros(how: object) -> None:
    assert callable(how)
    w = weight(torch.bfloat16)
    w[2] = 0
    found = how(w)
    assert found.shape == w.shape and found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    assert not found[2].any()


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 bits; 2 to 8"):
        round_to_nearest(weight(), 1)
    with pytest.raises(ValueError, match="group of 60 does not divide rows of 128"):
        nf4(weight(), 60)


def test_bitsandbytes_rounds_alike() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) * 0.02
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(functional.dequantize_4bit(packed, state), nf4(weight, 64))
    half = weight.half()
    theirs = functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(half)[:2]).float()
    level = half.float().abs().amax(1, keepdim=True) / 127
    # theirs divides in half precision, so that what lies between two levels may go to the other one
    assert ((theirs - round_to_nearest(half.float(), 8)).abs() <= 1.01 * level).all()
