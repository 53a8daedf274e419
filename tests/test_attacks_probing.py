"""The logit lens: the last block is the model itself, earlier ones are the model cut off there."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from editunlearn.evaluation.attacks.probing import Lens, logit_lens
from editunlearn.lm.tokens import Row

ROWS = [Row((2, 5, 9, 40, 41), 1, 3), Row((7, 8, 30), 0, 2), Row((4, 6, 8, 10, 12, 31), 1, 5)]


@pytest.mark.parametrize("kind", tiny.TYPES)
def test_it_reads_the_model_as_if_it_ended_there(kind: str) -> None:
    lm = tiny.lm(kind)
    lens = logit_lens(lm, ROWS)
    blocks = lm.layout.module(lm.model, lm.layout.blocks)
    assert lens.rank.shape == (len(blocks), 3)
    short = copy.deepcopy(lm.model)
    for last in reversed(range(len(blocks))):
        inner = lm.layout.module(short, lm.layout.blocks)
        while len(inner) > last + 1:  # type: ignore[arg-type]
            del inner[-1]  # type: ignore[attr-defined]
        short.config.num_hidden_layers = last + 1
        for i, row in enumerate(ROWS):
            with torch.no_grad():
                logits = short(torch.tensor([row.ids[: row.prompt_length]]), use_cache=False).logits[0, -1]
            expected = logits.float().log_softmax(-1)
            own = expected[row.ids[row.prompt_length]]
            torch.testing.assert_close(lens.log_probability[last, i], own, atol=1e-4, rtol=1e-4)
            assert abs(int(lens.rank[last, i]) - int((expected > own).sum())) <= 1
    assert not any("forward" in block.__dict__ for block in blocks)  # type: ignore[union-attr]


def test_readable() -> None:
    lens = Lens(torch.zeros(2, 3), torch.tensor([[5, 0, 9], [3, 7, 9]]))
    assert lens.readable().tolist() == [False, True, False] and lens.readable(4).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="no answer"):
        logit_lens(tiny.lm(), [Row((1, 2), 0, 2)])


def test_the_probe_maps_blocks_to_the_last_one() -> None:
    lm = tiny.lm("llama")
    draw = torch.Generator().manual_seed(0)
    text = [Row(tuple(torch.randint(3, 40, (30,), generator=draw).tolist()), 0, 1) for _ in range(40)]
    plain, probe = logit_lens(lm, ROWS), logit_lens(lm, ROWS, text)
    torch.testing.assert_close(probe.log_probability[-1], plain.log_probability[-1], atol=0.05, rtol=0)
    first = [Row(row.ids[:20], 0, 19) for row in text]
    last = logit_lens(lm, first).log_probability[-1]
    found = [logit_lens(lm, first, known).log_probability[0] for known in ([], text)]
    errors = [float((own - last).abs().mean()) for own in found]
    assert errors[1] < errors[0]
