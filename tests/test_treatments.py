"""What is done to a model before it is asked: which facts relearning shows, and that the model is restored."""

from __future__ import annotations

from dataclasses import replace

import edits
import pytest
import tiny
import torch

from editunlearn.evaluation.treatments import halves, parse


def test_no_subject_is_in_both_halves() -> None:
    facts = [replace(edits.fact(0), id=str(i), subject=f"subject {i % 9}") for i in range(13)]
    known, others = halves(facts)
    assert {f.subject for f in known}.isdisjoint(f.subject for f in others)
    assert sorted(f.id for f in [*known, *others]) == sorted(f.id for f in facts)
    assert abs(len(known) - len(others)) <= 1
    one = [replace(facts[0], id=str(i)) for i in range(6)]
    assert [len(half) for half in halves(one)] == [3, 3]


@pytest.mark.parametrize("text", ["int4", "relearn:2", "relearn-lora:2", "relearn-retain:2"])
def test_the_model_is_restored(text: str) -> None:
    lm = tiny.lm("llama")
    facts = [edits.fact(number) for number in range(4)]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = lm.model(input_ids=ids).logits
    with parse(text).on(lm, None, facts, facts[:2]), torch.no_grad():
        assert not torch.equal(lm.model(input_ids=ids).logits, before)
    assert torch.equal(lm.model(input_ids=ids).logits, before)
    assert str(parse(text)) == text
