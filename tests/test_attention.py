"""Attention for short rows gives what torch's own gives, forward and backward, and is used only where it was meant."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from edits import relative
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KNOWN

from editunlearn.lm import attention
from editunlearn.lm.attention import short_rows
from editunlearn.lm.hooks import frozen
from editunlearn.lm.tokens import Row, batch

CPU = torch.device("cpu")
ROWS = [Row((0, 5, 6, 7, 8, 9), 2, 4), Row((0, 11, 12), 1, 2), Row((0, 14, 15, 16, 17), 3, 4)]


def gradient(lm: Any, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at real tokens, and a gradient at the embeddings."""
    padded = batch(ROWS, lm.pad_id, left=left)
    table = lm.model.get_input_embeddings().weight
    seen = table.detach().clone()[padded.input_ids].requires_grad_(True)
    inputs = {k: v for k, v in padded.inputs.items() if k != "input_ids"}
    logits = lm.model(inputs_embeds=seen, **inputs, use_cache=False).logits[padded.attention_mask.bool()]
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    (found,) = torch.autograd.grad((logits * weights).sum(), seen)
    return logits.detach(), found[padded.attention_mask.bool()]


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("left", [False, True])
def test_it_is_torchs_attention(kind: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, used = tiny.lm(kind), list[bool]()
    if kind in ("gemma2", "bloom", "gptj", "falcon"):
        pytest.skip("it has an attention of its own")
    lm.model.set_attn_implementation("sdpa")
    own = attention._folded
    monkeypatch.setattr(attention, "_folded", lambda *a, **k: (used.append(True), own(*a, **k))[1])
    with frozen(lm.model):
        plain = gradient(lm, left)
        assert not used
        with short_rows(CPU):
            ours = gradient(lm, left)
        again = gradient(lm, left)
    assert all(relative(a, b) < 1e-4 for a, b in zip(ours, plain, strict=True))
    assert torch.equal(again[1], plain[1])
    assert used


def test_what_it_leaves_to_torch() -> None:
    plain = KNOWN["sdpa"]
    with short_rows(torch.device("cuda")):
        assert KNOWN["sdpa"] is plain
    with short_rows(CPU):
        outer = KNOWN["sdpa"]
        with short_rows(CPU):
            assert KNOWN["sdpa"] is outer is not plain
        assert KNOWN["sdpa"] is outer
        module = torch.nn.Module()
        short, long = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (6, attention.LONGEST + 1))
        assert attention._short(short, short) and not attention._short(long, long)
        assert not attention._short(short[:, :, :1], short) and not attention._short(short.detach(), short.detach())
        with torch.no_grad():
            assert not attention._short(short, short)
        per_head = torch.zeros(1, 2, 6, 6)
        assert attention._folded(module, short, short, short, per_head) is None
        assert attention._folded(module, short, short, short, None, is_causal=False) is None
        assert attention._folded(module, short[:, :, :3], short, short, None) is None
        assert attention._folded(module, short, short, short, None, softcap=50.0) is None
        assert attention._folded(module, short, short, short, None) is not None
    assert KNOWN["sdpa"] is plain


def test_an_exception_puts_torchs_back() -> None:
    plain = KNOWN["sdpa"]
    with pytest.raises(KeyError), short_rows(CPU):
        raise KeyError
    assert KNOWN["sdpa"] is plain


def test_a_row_of_padding_alone_has_no_nan() -> None:
    query = torch.randn(2, 4, 3, 8, requires_grad=True)
    key = torch.randn(2, 2, 3, 8)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    mask[1] = False
    found = attention._folded(torch.nn.Module(), query, key, key, mask)
    assert found is not None and torch.isfinite(found[0]).all()
    assert torch.isfinite(torch.autograd.grad(found[0].sum(), query)[0]).all()
