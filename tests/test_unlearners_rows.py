"""What the unlearners train on: rows, wrong labels, other answers, and the order that they come in."""

from __future__ import annotations

import pytest
import torch
from edits import fact
from unlearning import ASKED, lm

from editunlearn.deltas.changes import Changes
from editunlearn.errors import InputError
from editunlearn.unlearners import rows
from editunlearn.unlearners.passes import Passes
from editunlearn.unlearners.rows import Draw


def test_wrong_labels() -> None:
    from editunlearn.unlearners import wrong

    model = lm()
    true, second = rows.forget(model, ASKED), wrong.second_choice(model, ASKED)
    assert second.rows == true.rows and second.labels is not None
    for row, labels in zip(true.rows, second.labels, strict=True):
        logits = model.model(torch.tensor([row.ids])).logits[0]
        for place, label in enumerate(labels.tolist()):
            at = row.prompt_length + place
            order = logits[at - 1].argsort(descending=True).tolist()
            assert label == next(token for token in order if token != row.ids[at])
    drawn = wrong.random(model, ASKED, 0)
    assert drawn.labels is not None
    tokens = torch.cat(list(drawn.labels)).tolist()
    assert not set(tokens) & set(model.tokenizer.all_special_ids)
    assert all(a != b for a, b in zip(tokens, [t for r in true.rows for t in r.ids[r.prompt_length :]], strict=True))
    view = Passes(model, Changes(model, []), {"wrong": second}, 99).view("wrong", [1, 0])
    assert view.now.labels.tolist() == [*second.labels[1].tolist(), *second.labels[0].tolist()]


def test_other_answers_are_never_true_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from editunlearn.unlearners import alternatives

    first, then = ["Tokyo, of course", " Kyoto. It is old", ""], [" Osaka\nand", "German", " radium"]
    said = iter([first, then, *[["tokyo", "french", "radium"]] * 9])
    monkeypatch.setattr(alternatives, "generate", lambda *_a, **_k: next(said))
    model = lm()
    with pytest.raises(InputError, match="1 facts the model has no other answer.*'f2'"):
        alternatives.pool(model, ASKED, 2, 4, 0)
    said = iter([[" Osaka", " German", " lead"]] * 8)
    pool = alternatives.pool(model, ASKED, 2, 4, 0)
    assert pool.each == 2 and len(pool.rows) == 6 and pool.rows[0] == pool.rows[1]
    ends = [model.tokenizer.decode(row.ids[row.prompt_length :]) for row in pool.rows[::2]]
    assert ends == [" Osaka", " German", " lead"]


def test_every_fact_comes_once_an_epoch_and_is_paired() -> None:
    draw = Draw(7, 3, {"retain": 4}, 0)
    assert draw.updates == 3
    for _ in range(3):
        parts = draw.epoch()
        assert sorted(n for part in parts for n in part) == list(range(7)) and {len(p) for p in parts} == {2, 3}
    seen = [n for _ in range(4) for n in draw.numbers("retain", 2)]
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]
    assert draw.numbers("retain", 0) and len(draw.numbers("retain", 99)) == 4
    assert all(n // 5 == f for n, f in zip(draw.one_of(5, [3, 1, 0]), [3, 1, 0], strict=True))


def test_rows_end_where_they_should() -> None:
    model = lm()
    row = rows.answer_row(model, fact(0))
    assert model.tokenizer.decode(row.ids[row.prompt_length :]) == " Tokyo"
    refusal = rows.refusal_row(model, fact(0))
    assert refusal.ids[-1] == model.end_id
    assert rows.whole(row).prompt_length == 1 and rows.whole(row).ids == row.ids
