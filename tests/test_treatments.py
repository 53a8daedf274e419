"""What is done to a model before it is asked: which facts relearning shows, and that the model is restored."""

from __future__ import annotations

from dataclasses import replace

import edits
import pytest
import tiny
import torch

from editunlearn.errors import InputError
from editunlearn.evaluation.attacks.relearning import Relearn
from editunlearn.evaluation.treatments import halves, parse


def test_no_subject_is_in_both_halves() -> None:
    facts = [replace(edits.fact(0), id=str(i), subject=f"subject {i % 9}") for i in range(13)]
    known, others = halves(facts)
    assert {f.subject for f in known}.isdisjoint(f.subject for f in others)
    assert sorted(f.id for f in [*known, *others]) == sorted(f.id for f in facts)
    assert abs(len(known) - len(others)) <= 1
    one = [replace(facts[0], id=str(i)) for i in range(6)]
    assert [len(half) for half in halves(one)] == [3, 3]


@pytest.mark.parametrize("text", ["int4", "relearn:2:0.01", "relearn-lora:2:0.001:3", "relearn-retain:2:0.0001"])
def test_the_model_is_restored(text: str) -> None:
    lm = tiny.lm("llama")
    facts = [edits.fact(number) for number in range(4)]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = lm.model(input_ids=ids).logits
    with parse(text).on(lm, None, facts, facts[:2]), torch.no_grad():
        assert not torch.equal(lm.model(input_ids=ids).logits, before)
    assert torch.equal(lm.model(input_ids=ids).logits, before)
    assert str(parse(text)) == text


def test_relearning_says_its_rate_and_its_seed() -> None:
    assert str(parse("relearn")) == "relearn:5:0.0001" and str(parse("relearn-lora:20")) == "relearn-lora:20:0.001"
    assert parse("relearn:7:1e-3", seed=4).relearn == Relearn(7, 1e-3, seed=4)
    assert str(parse("relearn:7:1e-3", seed=4)) == "relearn:7:0.001:4" == str(parse("relearn:7:1e-3:4", seed=9))
    assert parse("relearn:7").label("memit") == "memit-relearn-7-0.0001"
    assert str(parse("subspace", seed=4)) == "subspace:1"  # nothing is drawn there


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("relearn:5:fast", "a learning rate between 0 and 1"),
        ("relearn:5:0", "a learning rate between 0 and 1"),
        ("relearn:5:nan", "a learning rate between 0 and 1"),
        ("relearn:5:1e-4:x", "and behind that a seed"),
        ("relearn:5:1e-4:-1", "and behind that a seed from 0"),
        ("relearn:5:1e-4:1:2", "and behind that a seed"),
        ("subspace:2:1", "stands one number, of strongest directions"),
    ],
)
def test_what_stands_behind_a_treatment(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse(text)
