"""Query merging: what goes together, what is shared, and that an edit of merged facts works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import edits
import pytest
import runs
import tiny
import torch
from edits import fact, nll, request, settings
from runs import World, call

from editunlearn import editors
from editunlearn.console import Console
from editunlearn.editors import merging
from editunlearn.editors.flow import Flow
from editunlearn.editors.past import PastKeys
from editunlearn.editors.value_types import Problem, Values
from editunlearn.errors import InputError
from editunlearn.hparams import Merge, load_hparams
from editunlearn.lm.tokens import Row
from editunlearn.workspace import Workspace


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return runs.build(tmp_path_factory.mktemp("merging") / "world")


def asked(subjects: str, targets: str = "") -> list[Any]:
    return [
        SimpleNamespace(id=str(i), subject=subject, target=targets[i] if targets else "no")
        for i, subject in enumerate(subjects)
    ]


@pytest.mark.parametrize(
    ("by", "subjects", "targets", "expected"),
    [
        ("subject", "abaab", "", [(0, 2), (1, 4), (3,)]),
        ("subject", "aAbb", "xxxy", [(0, 1), (2,), (3,)]),
        ("run", "abcde", "", [(0, 1), (2, 3), (4,)]),
        ("run", "abcde", "xyxyx", [(0, 2), (1, 3), (4,)]),
        ("all", "abcde", "", [(0, 1, 2, 3, 4)]),
        ("all", "abcde", "xyxyx", [(0, 2, 4), (1, 3)]),
    ],
)
def test_groups(by: Any, subjects: str, targets: str, expected: list[tuple[int, ...]]) -> None:
    found = merging.groups(asked(subjects, targets), Merge(by=by, size=2), None)
    assert list(found.members) == expected
    assert [found.members[group].count(i) for i, group in enumerate(found.owner)] == [1] * len(subjects)


def test_similar_keys_go_together() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=draw)
    keys = centres[[0, 1, 2, 0, 1, 2]] * torch.tensor([[1.0], [2], [3], [4], [5], [6]])
    keys = keys + 0.05 * torch.randn(6, 16, generator=draw)
    found = merging.groups(asked("abcdef"), Merge(by="key", size=2), keys)
    assert list(found.members) == [(0, 3), (1, 4), (2, 5)]


def test_what_a_group_shares() -> None:
    each = [Problem((Row((i,), 0, 1), Row((i, i), 0, 1)), (Row((9, i), 0, 1),)) for i in range(4)]
    found = merging.Groups(((0, 2, 3), (1,)), "group", optimised=2)
    first, second = found.problems(each)
    assert [row.ids for row in first.rows] == [(0,), (2,), (0, 0), (2, 2)] and len(first.pinned) == 2
    assert second.rows == each[1].rows
    value = Values(*(torch.tensor([[1.0], [2.0]]) for _ in range(4)))
    assert found.values(value).loss.flatten().tolist() == [1.0, 2.0, 1.0, 1.0]
    assert found.columns(torch.tensor([[1.0], [5.0], [2.0], [6.0]])).flatten().tolist() == [3.0, 5.0]
    assert found.ids(asked("abcd")) == [None, "1"]
    apart = replace(found, keys="sample")
    assert apart.columns(torch.eye(4)).equal(torch.eye(4)) and apart.ids(asked("abcd")) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("method", [m for m in editors.names() if "merge" in editors.schema(m).model_fields])
@pytest.mark.parametrize("keys", ["sample", "group"])
def test_merged_facts_are_written(method: str, keys: str, text: str) -> None:
    lm = tiny.lm("llama")
    facts = request()
    hp = settings(method, text, "merge.by=run", "merge.size=2", f"merge.keys={keys}", "refine=null", "value.steps=12")
    delta = editors.fit(lm, facts, hp)
    assert {f.rank for f in delta.factors.values()} == {3 if keys == "sample" else 2}
    before = nll(lm, facts.facts)
    with delta.applied(lm):
        assert nll(lm, facts.facts) < before
    if keys == "group":
        assert len(delta.without(["f2"]).factors) == len(delta.factors)  # it has a column of its own
        with pytest.raises(InputError, match="f0"):
            delta.without(["f0"])


def test_with_refine_merged_facts_are_learned(text: str) -> None:
    lm, facts = tiny.lm("llama"), request()
    plain = nll(lm, facts.facts)
    with editors.fit(lm, facts, settings("memit", text, "merge.by=all", "merge.keys=group")).applied(lm):
        assert nll(lm, facts.facts) < plain - 0.01


def test_an_interrupted_run_goes_on_with_the_values_of_facts(text: str, tmp_path: Any) -> None:
    lm, hp = tiny.lm("llama"), settings("memit", text, "merge.by=run", "merge.size=2")
    work = Workspace(tmp_path, {})

    def flow() -> Flow:
        return Flow(lm, request(), hp, editors.module("memit"), PastKeys(), work, None, Console(quiet=True))

    first, second = flow().run(), flow().run()
    assert work.get("values") is not None and len(work.get("values")["loss"]) == 3
    for name, pair in first.factors.items():
        assert torch.equal(pair[0], second.factors[name][0])


def test_settings_of_merging() -> None:
    assert load_hparams("memit").merge is None
    assert load_hparams("memit", set=["merge.by=key"]).merge == Merge(by="key")
    with pytest.raises(InputError, match="merge.size"):
        load_hparams("memit", set=["merge.size=1"])
    assert fact(0).subject in edits.TAUGHT[0]


def test_the_flag(world: World, tmp_path: Path) -> None:
    done = call("apply", *world.flags(tmp_path / "run", "--merge-queries", "all", "--evaluate", "none", "-v"))
    assert done.code == 0, done.err
    assert "merged by all: 2 facts in 1 groups of 2 to 2" in done.err and "together: " in done.err
    unknown = call("apply", *world.flags(tmp_path / "other", "--merge-queries", "subjects"))
    assert unknown.code == 2 and "merge.by" in unknown.err and "must be one of subject, key" in unknown.err
