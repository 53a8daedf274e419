"""What is seen of a model's passes: padding, ends of prompts, steps of decoding."""

from __future__ import annotations

import tiny
import torch

from editunlearn.lm.sequences import Piece, forward, watched
from editunlearn.lm.tokens import Row, batch

ROWS = [Row((5, 6, 7, 8, 9), 2, 3), Row((5, 6), 0, 1)]


@torch.no_grad()
def test_ends_and_padding() -> None:
    lm = tiny.lm()
    with watched(lm.model) as watcher:
        for left, ends in ((False, [4, 1]), (True, [4, 4])):
            padded = batch(ROWS, lm.pad_id, left=left)
            lm.model(**padded.inputs)
            assert watcher.piece.ends.tolist() == ends  # nobody said: all of a row is prompt
            assert torch.equal(watcher.piece.mask, padded.attention_mask.bool())
            forward(lm.model, padded)
            assert torch.equal(watcher.piece.ends, padded.last) and not watcher.piece.decoding
            assert watcher.piece.prompt.sum(1).tolist() == [3, 1]
        lm.model(padded.input_ids)
        assert watcher.piece.mask.all() and watcher.piece.ends.tolist() == [4, 4]
        lm.model(inputs_embeds=torch.zeros(3, 4, lm.model.config.hidden_size))
        assert watcher.piece.mask.shape == (3, 4)
    assert not lm.model._forward_hooks and not lm.model._forward_pre_hooks


@torch.no_grad()
def test_what_was_decided_stays_with_its_cache() -> None:
    lm, one = tiny.lm(), torch.tensor([[5], [6]])
    with watched(lm.model) as watcher:
        caches = []
        for value in (1.0, 2.0):
            out = lm.model(input_ids=one.repeat(1, 3), use_cache=True)
            watcher.piece.kept["x"] = torch.full((2,), value)
            caches.append(out.past_key_values)
        for cache, value in zip(caches, (1.0, 2.0), strict=True):
            lm.model(input_ids=one, past_key_values=cache, attention_mask=torch.tensor([[1] * 4, [0] + [1] * 3]))
            assert watcher.piece.decoding and watcher.piece.kept["x"].tolist() == [value] * 2
            assert watcher.piece.mask.tolist() == [[True], [True]]
        lm.model(input_ids=one.repeat(1, 2), past_key_values=caches[0])
        assert not watcher.piece.decoding and watcher.piece.ends.tolist() == [1, 1]


def test_states_that_a_module_has_flattened() -> None:
    piece = Piece(torch.ones(2, 3, dtype=torch.bool), torch.tensor([2, 1]), False)
    states = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(piece.rows(states.reshape(6, 4)), states)
    assert piece.prompt.tolist() == [[True] * 3, [True, True, False]]
