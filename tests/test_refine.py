"""Refine: the optimiser, the unit of a step, the weights of rows, what it is given and what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from edits import fact, request, settings

from editunlearn import editors
from editunlearn.console import Console
from editunlearn.editors import flow, made_up, objective, refine
from editunlearn.editors.column_adam import ColumnAdam
from editunlearn.editors.refine import step_units
from editunlearn.editors.schedule import Schedule
from editunlearn.hparams import Refine, load_hparams
from editunlearn.lm.head import Head
from editunlearn.lm.hooks import low_rank_hook, on_output
from editunlearn.lm.tokens import Row
from editunlearn.numerics.losses import largest_by


def test_a_column_moves_along_its_gradient() -> None:
    left = {"m": torch.zeros(4, 2)}
    gradient = torch.tensor([[3.0, 0.01], [0.0, 0.0], [-4.0, 0.02], [0.0, 0.0]])
    left["m"].grad = gradient.clone()
    ColumnAdam(left, {"m": torch.tensor([0.5, 2.0])}).step(1.0)
    for column, size in enumerate((0.5, 2.0)):
        moved, wanted = -left["m"][:, column], gradient[:, column]
        torch.testing.assert_close(moved / moved.norm(), wanted / wanted.norm())
        assert abs(float(moved.square().mean().sqrt()) - size) < 1e-5  # whatever the size of the gradient


def test_resumed_steps_equal_uninterrupted_ones() -> None:
    def gradient(step: int) -> torch.Tensor:
        return torch.randn(5, 3, generator=torch.Generator().manual_seed(step))

    straight = {"m": torch.ones(5, 3)}
    optimiser = ColumnAdam(straight, {"m": torch.full((3,), 0.1)})
    for step in range(6):
        if step == 3:
            kept = {name: value.clone() for name, value in optimiser.state().items()}
        straight["m"].grad = gradient(step)
        optimiser.step(1.0)
    resumed = {"m": torch.zeros(5, 3)}
    again = ColumnAdam(resumed, {"m": torch.full((3,), 0.1)})
    again.load(kept)
    for step in range(again.count, 6):
        resumed["m"].grad = gradient(step)
        again.step(1.0)
    assert torch.equal(straight["m"], resumed["m"])


def test_a_step_is_measured_in_the_whole_change_of_each_fact() -> None:
    left, keys = torch.tensor([[2.0, 3.0], [-2.0, 3.0]]), torch.eye(2)
    torch.testing.assert_close(step_units(left, torch.diag(torch.tensor([0.1, 0.5])), keys), torch.tensor([20.0, 6.0]))
    torch.testing.assert_close(step_units(left, 2 * torch.eye(2), keys), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(step_units(left, torch.zeros(2, 2), keys), torch.tensor([2000.0, 3000.0]))


@pytest.mark.parametrize("most", [2, 1])
def test_rows_count_by_what_they_still_lack(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    lm, floor = tiny.lm("llama"), 4.0
    warnings: list[str] = []
    states = objective.hidden_at_targets

    def scarce(lm: Any, padded: Any) -> torch.Tensor:
        if len(padded.input_ids) > most:
            raise torch.OutOfMemoryError("out of memory")
        return states(lm, padded)

    monkeypatch.setattr(objective, "hidden_at_targets", scarce)
    name = lm.layout.site(1).name
    d_out, d_in = lm.layout.read_weight(lm.model, name).shape
    random = torch.Generator().manual_seed(0)
    right = torch.randn(2, d_in, generator=random)
    left = (0.01 * torch.randn(d_out, 2, generator=random)).requires_grad_(True)
    facts = [[Row((5, 6, 7, 8, 9), 1, 3), Row((3, 4, 5, 6, 7, 8), 2, 5)], [Row((9, 8, 7, 6), 1, 3)]]

    def losses_of(rows: list[Row]) -> torch.Tensor:
        found = []
        for row in rows:
            token = -lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            at = torch.arange(row.prompt_length, len(row.ids))
            nll = token[at - 1, torch.tensor(row.ids)[at]]
            found.append(nll.mean() + nll.max())
        return torch.stack(found)

    with on_output(lm.layout.module(lm.model, name), low_rank_hook(left, right)):
        loss = losses_of([row for fact in facts for row in fact])
        share = torch.tensor([0.25, 0.25, 0.5])
        excess = (loss.detach() - floor).clamp(min=0)
        (loss * share * excess / (share @ excess)).sum().backward()
        wanted, left.grad = left.grad, None
        gradient = objective.Gradient({name: left}, 12, warnings.append)
        assert (
            abs(float(objective.forget_loss(Head(lm), facts, gradient, floor).mean()) - float(share @ loss.detach()))
            < 1e-4
        )
    assert len(warnings) == 2 - most
    assert wanted is not None
    torch.testing.assert_close(left.grad, wanted, rtol=1e-3, atol=1e-7)


def test_what_is_left_out_of_a_step_changes_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, ran = tiny.lm(), [0]
    lm.model.register_forward_pre_hook(
        lambda _module, _args, given: ran.__setitem__(0, ran[0] + given["input_ids"].numel()), with_kwargs=True
    )
    seen: list[Any] = []
    monkeypatch.setattr(flow, "refine", lambda *args, **more: seen.append((args, more)) or refine.refine(*args, **more))
    editors.fit(lm, request((0, 1, 2), (3,)), settings("memit", text, "refine.steps=3"))
    (args, more), found = seen[0], []
    for plainly in (False, True):
        if plainly:
            monkeypatch.setattr(objective, "tightly", lambda lengths, tokens: [list(range(len(lengths)))])
            monkeypatch.setattr(objective.Batch, "but_last", lambda padded: padded)
        ran[0] = 0
        left = refine.refine(*args, **{k: more[k] for k in ("units", "kept_keys", "seed")})
        found.append((ran[0], left))
    (few, ours), (many, plain) = found
    assert few < 0.8 * many, (few, many)
    for name, (before, _) in args[1].items():
        assert float((ours[name] - plain[name]).norm()) < 1e-3 * float((plain[name] - before).norm())


def run_of(schedule: Schedule, learned_at: int) -> list[float]:
    """Rates of a run in which the facts are learned after ``learned_at`` steps."""
    rates: list[float] = []
    while len(rates) < schedule.end:
        rates.append(schedule.rate(len(rates)))
        if schedule.may_grow(len(rates)) and len(rates) < learned_at:
            schedule.grow()
    return rates


def test_more_steps_while_facts_are_not_learned() -> None:
    cosine = run_of(Schedule(40, 40), 1000)
    assert len(cosine) == 40 and cosine[0] == 1.0 and cosine == sorted(cosine, reverse=True)
    assert run_of(Schedule(40, 80), 1) == run_of(Schedule(40, 80), 40) == cosine
    longer = run_of(Schedule(40, 80), 41)
    assert longer[:40] == cosine and len(longer) == 50 and 0.5 < longer[40] < 0.53 and longer[-1] < 0.06
    assert len(run_of(Schedule(40, 80), 51)) == 60
    assert len(run_of(Schedule(40, 80), 71)) == len(run_of(Schedule(40, 80), 1000)) == 80
    assert len(run_of(Schedule(1, 2), 1000)) == 2


def test_a_schedule_goes_on_where_it_stopped() -> None:
    interrupted, resumed = Schedule(40, 80), Schedule(40, 80)
    interrupted.grow()
    resumed.load(interrupted.state())
    assert [resumed.rate(step) for step in range(40, 50)] == run_of(Schedule(40, 80), 41)[40:]
    assert resumed.may_grow(50) and not resumed.may_grow(49)


def test_a_prompt_gives_its_target_when_greedy_decoding_begins_like_it() -> None:
    lm, warnings = tiny.lm("gemma2"), list[str]()
    rows = []
    for start, length in (((5, 6, 7), 4), ((3, 4), 1), ((9, 8, 7, 6), 3)):
        ids = list(start)
        for _ in range(length):
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(Row(tuple(ids), 0, len(start)))

    def spoilt(row: Row, token: int) -> Row:
        """Another token in the target's place; what follows is what the model writes behind it."""
        ids = list(row.ids)
        place = row.prompt_length + token
        ids[place] = (ids[place] + 1) % 20
        for later in range(place + 1, len(ids)):
            ids[later] = int(lm.model(torch.tensor([ids[:later]])).logits[0, -1].argmax())
        return replace(row, ids=tuple(ids))

    def share(*found: Row) -> float:
        return float(objective.learned(Head(lm), found, objective.Gradient({}, 10, warnings.append)).mean())

    assert share(*rows) == 1.0
    assert share(*rows, spoilt(rows[0], 0)) == 0.75  # it begins otherwise
    assert share(spoilt(rows[1], 0), rows[2]) == 0.5
    assert share(spoilt(rows[0], 2), spoilt(rows[2], 1)) == 1.0  # one token that is not the first
    twice = spoilt(rows[0], 3)
    assert share(replace(twice, ids=(*spoilt(twice, 1).ids[:-1], (twice.ids[-1] + 3) % 20)), rows[0]) == 0.5
    assert not warnings


def test_steps_are_added_while_unseen_prompts_do_not_give_their_target() -> None:
    lm = tiny.lm("llama")
    module = lm.layout.sites([0])[0].name
    width = lm.layout.module(lm.model, module).weight.shape
    factors = {module: (torch.full((width[0], 1), 1e-3), torch.full((1, width[1]), 0.1))}
    rows = [[Row((5, 6, 7, 9), 1, 3)]]
    text = [Row((3, 4, 5), 0, 1)]
    hp = Refine(steps="auto", lr=1e-6)
    likeliest = int(lm.model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    right, wrong = [Row((5, 6, 7, likeliest), 1, 3)], [Row((5, 6, 7, 9), 1, 3)]
    # a fact that is never learned counts, however many others are; one that mostly is does not
    one_of_many = [[*right * 2, *wrong], *[right * 20] * 19]
    for unseen, share, count in (
        ([wrong], "0.0%", 4),
        ([right], "100.0%", 1),
        ([wrong, *[right] * 19], "95.0%", 4),
        (one_of_many, "98.3%", 1),
    ):
        said = list[str]()
        units = {module: torch.ones(1)}
        goals = refine.Goals(rows, [], text, unseen)
        refine.refine(
            lm, factors, goals, hp, units=units, kept_keys={module: torch.zeros(0, width[1])}, tell=said.append
        )
        assert [f"after {40 + 10 * i} steps" in line for i, line in enumerate(said)] == [True] * count
        assert said[-1].endswith(f"; {30 + 10 * count} steps in all") or count == 4
        assert f"refine: {share} of unseen" in said[0]


def test_the_change_at_kept_keys_is_relative_to_the_closed_forms() -> None:
    draw = torch.Generator().manual_seed(0)
    factors = {m: (torch.randn(4, 3, generator=draw), torch.randn(3, 5, generator=draw)) for m in ("a", "b", "none")}
    keys = {"a": torch.randn(7, 5, generator=draw), "b": torch.randn(2, 5, generator=draw), "none": torch.zeros(0, 5)}
    found = objective.AtKeptKeys(factors, keys)
    left = {m: torch.randn(4, 3, generator=draw).requires_grad_(True) for m in factors}

    def literal(values: dict[str, torch.Tensor]) -> torch.Tensor:
        changes = {m: (values[m] @ factors[m][1] @ keys[m].T).square().sum() for m in ("a", "b")}
        first = {m: (factors[m][0] @ factors[m][1] @ keys[m].T).square().sum() for m in ("a", "b")}
        return torch.stack([changes[m] / first[m] for m in changes]).mean()

    assert abs(found.loss({m: pair[0].clone() for m, pair in factors.items()}, 1.0) - 1) < 1e-6
    literal(left).backward()  # type: ignore[no-untyped-call]
    wanted = {m: value.grad for m, value in left.items()}
    for value in left.values():
        value.grad = None
    left["a"].grad = torch.ones(4, 3)
    torch.testing.assert_close(found.loss(left, 0.5), float(literal(left).detach()))
    for name, before in (("a", 1.0), ("b", 0.0)):
        gradient, whole = left[name].grad, wanted[name]
        assert gradient is not None and whole is not None
        torch.testing.assert_close(gradient, before + 0.5 * whole)
    assert left["none"].grad is None


def test_largest_of_each_group() -> None:
    values = torch.tensor([1.0, 4.0, 3.0, -2.0], requires_grad=True)
    found = largest_by(values, torch.tensor([0, 0, 2, 3]), 4)
    assert found.tolist() == [4.0, 0.0, 3.0, -2.0]
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None and values.grad.tolist() == [0.0, 1.0, 1.0, 1.0]


def test_a_batch_that_does_not_fit_leaves_no_gradient() -> None:
    left = torch.zeros(3, requires_grad=True)
    warnings: list[str] = []
    rows = [Row((1, 2, 3), 1, 3)] * 3

    def run(part: Sequence[int]) -> None:
        (left[list(part)].sum() * 2).backward()  # type: ignore[no-untyped-call]
        if len(part) > 1:  # as when memory runs out in the middle of a backward pass
            raise torch.OutOfMemoryError("out of memory")

    objective.Gradient({"m": left}, 100, warnings.append).over(rows, run)
    assert left.grad is not None and left.grad.tolist() == [2.0, 2.0, 2.0]
    assert warnings == [
        "out of memory with 3 at once; going on with 1",
        "out of memory with 2 at once; going on with 1",
    ]


def test_what_refine_is_given(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up, "capitalised_words", lambda _: [])
    seen: dict[str, Any] = {}

    def watched(lm: Any, factors: Any, goals: Any, hp: Any, **more: Any) -> Any:
        seen.update(goals=goals, reports=0)
        tell = more.pop("report")

        def report(*losses: Any) -> None:
            seen["reports"] += 1
            seen["expected"] = losses[1]
            tell(*losses)

        return refine.refine(lm, factors, goals, hp, report=report, **more)

    monkeypatch.setattr(flow, "refine", watched)
    asked = replace(request((0, 1), (3,)), general=(fact(4, None),), names=(fact(5, None),))
    editors.fit(tiny.lm(), asked, settings("memit", text, "refine.steps=auto"))
    own, others, known, strangers = (len(pool) for pool in seen["goals"].retain)
    assert (own, known) == (1, 2)  # unknown facts count
    assert (others, strangers) == (2 * 3, 2 * 3)  # two prompts with each of three other names
    assert seen["reports"] == seen["expected"] <= 80


@pytest.mark.parametrize(("pool", "number"), [("kl", 1), ("text_kl", 2)])
def test_refine_holds_what_is_to_stay(text: str, pool: str, number: int) -> None:
    lm = tiny.lm()
    seen: list[list[float]] = []

    class Loud(Console):
        def detail(self, message: str, level: int = 1) -> None:
            if message.startswith("refine "):
                seen[-1] = [float(part.split()[-1]) for part in message.split(":")[1].split(",")]

    for weight in (0, 100):
        seen.append([])
        others = [f"refine.{name}=0" for name in ("kl", "text_kl") if name != pool]
        hp = settings("memit", text, "refine.steps=15", f"refine.{pool}={weight}", *others)
        editors.fit(lm, request(), hp, console=Loud(quiet=True))
    free, held = (losses[number] for losses in seen)
    assert held < 0.7 * free and seen[1][0] > seen[0][0]


def test_a_pool_is_gone_through_before_anything_comes_twice(text: str) -> None:
    hp = load_hparams("memit", set=["refine.retain_batch=3"]).refine
    assert hp is not None
    draw = refine._Draw(refine.Goals([], [[], [None] * 7], []), hp, 0)  # type: ignore[list-item]
    drawn = [draw.retain() for _ in range(20)]
    assert all(len(d) == 3 for d in drawn)
    flat = [i for d in drawn for i in d]
    assert all(sorted(flat[i : i + 7]) == list(range(7)) for i in range(0, 56, 7))
    assert draw.forget() == [] and draw.text() == []
    sizes = (4, 1, 100)
    several = refine._Draw(refine.Goals([], [[], *([None] * n for n in sizes)], []), hp, 0)  # type: ignore[list-item]
    for _ in range(9):
        first, only, last = several.retain()  # one of each at least
        assert first < 4 and only == 4 and 5 <= last < 105
    hp = hp.model_copy(update={"retain_batch": 26})
    shares = refine._Draw(refine.Goals([], [[None] * n for n in (4, 1, 100)], []), hp, 0)  # type: ignore[list-item]
    numbers = shares.retain()
    assert [sum(a <= i < b for i in numbers) for a, b in ((0, 4), (4, 5), (5, 105))] == [4, 1, 21]
    few = refine._Draw(refine.Goals([], [[None], [None] * 9], []), hp, 0)  # type: ignore[list-item]
    assert sorted(few.retain()) == list(range(10))  # no more than there are
