"""Subjects in other letters: how they are written, and that an edit holds there, too."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import tiny
import torch
from edits import CLOSED_FORM, TAUGHT, fact, nll, request, settings

from editunlearn import editors, estimate
from editunlearn.editors import contexts
from editunlearn.errors import InputError
from editunlearn.facts.spellings import FORMS, spelled
from editunlearn.hparams import EditorHParams, load_hparams

BOTH = "spellings=[lower, upper]"


def same_delta(one: Any, other: Any) -> bool:
    return all(
        torch.equal(one.factors[name].left, other.factors[name].left)
        and torch.equal(one.factors[name].right, other.factors[name].right)
        for name in one.factors
    )


def test_how_a_subject_is_written() -> None:
    curie = fact(2)
    found = spelled(curie, tuple(FORMS))
    assert [f.subject for f in found] == ["marie curie", "MARIE CURIE", "Marie-Curie", '"Marie Curie"']
    assert [f.prompt for f in found][:2] == ["marie curie discovered", "MARIE CURIE discovered"]
    assert all(f.prompt[f.subject_start : f.subject_end] == f.subject and f.target == curie.target for f in found)
    assert [f.subject for f in spelled(fact(3), tuple(FORMS))] == ["BRIDGE", '"bridge"']  # the others change nothing
    assert spelled(curie, ()) == []


def test_the_forms_are_those_that_settings_allow() -> None:
    (allowed,) = get_args(EditorHParams.model_fields["spellings"].annotation)
    assert get_args(allowed) == tuple(FORMS)
    with pytest.raises(InputError, match="spellings.0: Input should be 'lower', 'upper', 'hyphens' or 'quotes'"):
        load_hparams("memit", set=["spellings=[small]"])
    with pytest.raises(InputError, match="spellings and merge do not go together"):
        load_hparams("memit", set=["spellings=[lower]", "merge.by=all"])


def test_every_spelling_has_rows_of_its_own_and_belongs_to_its_fact(text: str) -> None:
    lm, hp = tiny.lm(), settings("memit", text, BOTH)
    facts = request((2, 3)).facts  # one of two spellings, one of one
    rows = contexts.forget_rows(lm, facts, ["It is. "], hp, hp.spellings)
    assert rows.owner == (0, 1, 0, 0, 1) and len(rows.targets) == 5 and len(rows.keys) == 10
    assert [len(of_fact) for of_fact in rows.by_fact()] == [6, 4]
    assert rows.by_fact()[1] == [*rows.targets[1], *rows.targets[4]]
    unseen = contexts.unseen_rows(lm, facts, hp, None)
    assert [len(of_fact) for of_fact in unseen] == [contexts.UNSEEN + 2, contexts.UNSEEN + 1]


@pytest.mark.parametrize("method", CLOSED_FORM)
def test_an_edit_holds_in_other_letters_and_goes_out_whole(method: str, text: str) -> None:
    lm = tiny.taught_lm([(prompt, answer) for prompt, _, answer in TAUGHT])
    made = request((1, 2))
    train = ("value.steps=30", "value.kl=0", "refine.steps=60", "refine.kl=0.1", "refine.text_kl=0.1")
    plain = settings(method, text, *train, "context_prefixes.count=1", "moments.weight=1")
    more = plain.model_copy(update={"spellings": ["lower", "upper"]})
    others = [other for f in made.facts for other in spelled(f, ("lower", "upper"))]
    losses = []
    for hp in (plain, more):
        delta = editors.fit(lm, made, hp)
        with delta.applied(lm):
            losses.append(nll(lm, others))
    assert losses[1] < 0.9 * losses[0]
    (columns,) = set(delta.columns.values())  # type: ignore[union-attr]
    one, other = columns[:2]
    assert columns == (one, other, one, one, other, other)
    assert set(delta.without(["f1"]).columns.values()) == {(other,) * 3}  # type: ignore[union-attr]


def test_a_subject_that_cannot_be_written_otherwise_is_edited_as_ever(text: str) -> None:
    lm, made = tiny.lm(), request((3, 5))  # small letters already
    plain = editors.fit(lm, made, settings("memit", text))
    assert same_delta(plain, editors.fit(lm, made, settings("memit", text, "spellings=[lower]")))


def test_with_refine_and_chunks(text: str) -> None:
    lm, made = tiny.lm(), request((1, 2))
    hp = settings("memit", text, BOTH, "chunks.size=3")
    delta: Any = editors.fit(lm, made, hp)
    (columns,) = set(delta.columns.values())
    counts = {columns.count(column) for column in columns}
    assert len(set(columns)) == 2 and min(counts) > 3


def test_the_estimate_counts_spellings() -> None:
    facts = request((1, 2, 3)).facts
    assert estimate.columns(load_hparams("memit", set=[BOTH]), facts) == 3 + 2 + 2 + 1
