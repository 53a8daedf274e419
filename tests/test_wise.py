"""WISE: loss, steps, merging and routing against the paper's equations, and what forgetting with it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference_memory
import tiny
import torch
from edits import REFUSAL, TAUGHT, fact, request, settings
from test_memory import forgetful, rows_of

from editunlearn import editors
from editunlearn.console import Console
from editunlearn.deltas import side as side_delta
from editunlearn.deltas.files import load, save
from editunlearn.deltas.kinds import compose
from editunlearn.deltas.memory import MemoryDelta
from editunlearn.deltas.side import SideMemory
from editunlearn.editors import contexts, memory_flow, side
from editunlearn.errors import NumericalError
from editunlearn.lm.generation import generate
from editunlearn.lm.likelihood import score
from editunlearn.lm.tokens import batch, encode
from editunlearn.numerics.side import activation, latest, middles, route, spared
from editunlearn.numerics.side_training import margin, merged, near, threshold
from editunlearn.workspace import Workspace


def test_activation_and_margin_by_hand() -> None:
    update = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    inputs = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 3.0]])  # of the first, the second and again the first
    owner = torch.tensor([0, 1, 0])
    assert activation(inputs, update, owner, 3).tolist() == pytest.approx([2.5, 52**0.5, 0.0])
    assert activation(inputs, update, owner, 3, 1).tolist() == pytest.approx([3.0, 52**0.5, 0.0])
    assert activation(inputs, update, owner, 3, 2).tolist() == activation(inputs, update, owner, 3).tolist()
    inside, outside = torch.tensor([1.0, 4.0]), torch.tensor([0.5, 2.5, 0.0])
    # above 3: 1 misses by 2; below 1: 2.5 by 1.5; 1 apart: 1 from 0.5 by 0.5, 1 from 2.5 by 2.5
    assert float(margin(inside, outside, 1.0, 3.0, 1.0)) == pytest.approx(2 + 1.5 + (0.5 + 2.5) / 2)
    assert float(margin(inside, outside[:0], 1.0, 3.0, 1.0)) == 2.0
    assert threshold(inside, outside, 0.5, None) == 0.5
    assert threshold(torch.tensor([4.0, 6.0]), torch.tensor([2.0, 1.0]), 0.5, 0.75) == 3.5
    assert threshold(torch.tensor([4.0]), torch.tensor([1.0]), 0.9, 0.5) == pytest.approx(3.6)


def test_what_of_a_prompt_is_looked_at() -> None:
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert latest(mask, 2).tolist() == [[False, False, True, True], [True, True, False, False]]
    assert latest(mask, None) is mask
    parts = {"updates": torch.ones(1, 2, 3), "thresholds": torch.ones(1), "marks": torch.ones(1, 3)}
    made = SideMemory.of({**parts, "owners": torch.zeros(1)}, {"window": 7, "most": None})
    assert made.to(torch.device("cpu")).awake().joined(made).settings() == {"window": 7, "most": None}
    with pytest.raises(ValueError, match="looks at prompts with"):
        made.joined(replace(made, window=8))
    for wrong in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="one token or more"):
            SideMemory.of({**parts, "owners": torch.zeros(1)}, {"window": None, "most": wrong})


def test_routing_is_a_choice_for_each_sequence() -> None:
    """Defect: one averaged distance decided for the batch, and several memories with several rows raised."""
    draw = torch.Generator().manual_seed(0)
    active, thresholds = torch.rand(50, 4, generator=draw), torch.rand(4, generator=draw)
    wanted = [reference_memory.wise_route(row, thresholds.tolist()) for row in active.tolist()]
    assert [None if n < 0 else n for n in route(active, thresholds).tolist()] == wanted
    assert None in wanted and len(set(wanted)) == 5
    assert route(active[:, :0], thresholds[:0]).tolist() == [-1] * 50


def test_merging() -> None:
    draw = torch.Generator().manual_seed(1)
    updates = [torch.randn(6, 7, generator=draw) * (torch.rand(6, 7, generator=draw) < 0.5) for _ in range(3)]
    for density in (1.0, 0.53, 0.2):
        assert torch.allclose(merged(updates, "ties", density).double(), reference_memory.ties(updates, density))
    assert torch.allclose(merged(updates, "linear", 0.2), sum(updates) / 3)
    one, other = torch.tensor([[4.0, 0.0, -3.0, 1.0]]), torch.tensor([[2.0, 5.0, 3.5, 0.0]])
    assert merged([one, other], "magnitude", 1.0).tolist() == [[3.0, 5.0, 0.25, 1.0]]
    assert merged([one, other], "ties", 1.0).tolist() == [[3.0, 5.0, 3.5, 1.0]]
    assert merged([one, other], "ties", 0.5).tolist() == [[4.0, 5.0, 3.5, 0.0]]
    assert merged([one], "ties", 0.25) is one


def test_no_active_sequence_is_left_out() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, update = torch.randn(600, 64, generator=draw), torch.randn(48, 64, generator=draw)
    owner = torch.arange(60).repeat_interleave(10)
    for most in (None, 4):
        exact = activation(inputs, update, owner, 60, most)
        for level in (float(exact.median()), float(exact.max())):
            found = near(inputs.bfloat16(), update, owner, 60, level, most)
            assert found[exact >= level].all() and not found[exact < 0.95 * level].any()
    assert near(inputs, update, owner, 60, 0.0).all()


def _trainer(lm: Any, *set_: str, forget: tuple[int, ...] = (0, 1), texts: int = 0) -> side.Trainer:
    own = [] if any(item.startswith("side=") for item in set_) else ["side.share=1"]
    asked, hp = request(forget, (3, 4)), settings("wise", "", "context_prefixes.count=1", *own, *set_)
    prefixes = contexts.prefixes(lm, hp.context_prefixes, None)
    rows = contexts.forget_rows(lm, asked.facts, prefixes, hp).targets
    kept = memory_flow.prompts_to_keep(lm, asked, hp)[:7]
    keep, passages = kept[: len(kept) - texts], kept[len(kept) - texts :]
    work, console = Workspace(None, {}), Console(quiet=True)
    stage = memory_flow.Stage(lm, hp, lm.layout.site(1), asked.facts, rows, keep, passages, work, console)
    return side.Trainer(stage)


@pytest.mark.parametrize(("tokens", "window", "most"), [(2048, None, None), (1, None, None), (2048, 5, 3)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
def test_loss_and_step_are_the_papers(kind: str, tokens: int, window: int | None, most: int | None) -> None:
    """Defects: labels placed by the length of the padded row; a bias and a transposed weight lost on the way."""
    lm = tiny.lm(kind)
    bias = getattr(lm.layout.module(lm.model, lm.layout.site(1).name), "bias", None)
    assert (bias is not None) == (kind in ("gpt2", "opt"))
    if bias is not None:  # it begins as zeros, which nobody would miss
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(4))
    absolute = ["margin={outside: 0.2, inside: 1.5, gap: 0.7, scale: absolute, weight: 2.0}", f"batch_tokens={tokens}"]
    step = ["side={steps: 1, lr: 0.5, scale: absolute, clamp: 0.03, mask: 0.3, share: 1}"]
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    read = [f"routing.{name}={number or 'null'}" for name, number in (("window", window), ("tokens", most))]
    trainer = _trainer(lm, *absolute, *step, *read)
    assert len({len(r.ids) for r in trainer.rows}) > 2
    assert max(r.prompt_length for r in trainer.stage.keep) > min(r.prompt_length for r in trainer.rows)
    draw = torch.Generator().manual_seed(3)
    update = 0.05 * torch.randn(trainer.shape, generator=draw)
    edits = [(r.ids, r.prompt_length) for r in trainer.rows]
    keep = [r.ids for r in trainer.stage.keep]
    literal = reference_memory.WiseModel(lm, trainer.stage.site.name, update)
    wanted = reference_memory.wise_loss(literal, edits, keep, (0.2, 1.5, 0.7), 2.0, window, most)
    ours = update.clone().requires_grad_(True)
    assert trainer.loss(ours, trainer.of([0, 1]), grad=True) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (grad,) = torch.autograd.grad(wanted, literal.update)
    assert ours.grad is not None
    assert float((ours.grad.double() - grad).norm() / grad.norm()) < 1e-4

    mask = torch.rand(trainer.shape, generator=draw) < 0.3
    stepped = update.clone().requires_grad_(True)
    trainer._fit(stepped, mask, [0, 1], 1)
    assert torch.allclose(stepped.double(), reference_memory.wise_step(update, grad, mask, 0.5, 0.03), atol=1e-5)


def test_passages_count_as_much_as_prompts() -> None:
    """Of a thousand prompts and a few passages, these would hardly be held otherwise."""
    lm = tiny.lm()
    update = 0.05 * torch.randn(_trainer(lm).shape, generator=torch.Generator().manual_seed(3))
    both = _trainer(lm, texts=2)
    alone = []
    for kind in both.keep:
        one = _trainer(lm, texts=2)
        one.keep = [kind]
        alone.append(one.loss(update, one.of([0, 1])))
    assert alone[0] != pytest.approx(alone[1])
    assert both.loss(update, both.of([0, 1])) == pytest.approx(sum(alone) / 2)


def test_what_is_kept_takes_turns() -> None:
    lm = tiny.lm()
    update = 0.05 * torch.randn(_trainer(lm).shape, generator=torch.Generator().manual_seed(3))
    trainer, whole = _trainer(lm, "side.share=0.4"), _trainer(lm)
    assert [[part.count for part in kind] for kind in trainer.keep] == [[4, 3]]
    assert sorted(trainer.outside(update).tolist()) == pytest.approx(sorted(whole.outside(update).tolist()))
    found = [trainer.loss(update, trainer.of([0, 1]), step) for step in range(3)]
    for part, loss in enumerate(found[:2]):
        alone = _trainer(lm)
        alone.keep = [[trainer.keep[0][part]]]
        assert loss == pytest.approx(alone.loss(update, alone.of([0, 1])), rel=1e-5)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(("learned", "looks"), [("0.0", [0, 1, 2, 3, 4, 5]), ("99.0", [0, 3])])
def test_learned_targets_rest(learned: str, looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins are shaped at every step; contexts are seen one after another however seldom targets are."""
    trainer = _trainer(tiny.lm(), "context_prefixes.count=3", "side.rest=3", f"side.learned={learned}", "side.steps=6")
    steps: list[int] = []
    said: list[tuple[int, list[int]]] = []
    margins, targets = trainer.margins, trainer.targets
    monkeypatch.setattr(trainer, "margins", lambda u, own, k, **kw: (steps.append(k), margins(u, own, k, **kw))[1])
    monkeypatch.setattr(
        trainer, "targets", lambda u, own, **kw: (said.append((steps[-1], own)), targets(u, own, **kw))[1]
    )
    trainer.train([0, 1], 0, lambda _done: None)
    assert steps == list(range(6))
    assert said == [(step, trainer.of([0, 1], k)) for k, step in enumerate(looks)]


@pytest.mark.parametrize(("most", "turns"), [("null", [[0, 1, 2, 3]]), ("2", [[0, 1], [0, 2], [0, 3]]), ("1", [[0]])])
def test_contexts_take_turns(most: str, turns: list[list[int]]) -> None:
    trainer = _trainer(tiny.lm(), "context_prefixes.count=3", f"side.contexts={most}")
    assert [trainer.of([1], step) for step in range(len(turns))] == [[4 + k for k in own] for own in turns]
    assert trainer.of([1, 0], len(turns)) == [4 * fact + k for fact in (0, 1) for k in turns[0]]
    assert trainer.of([1]) == [4, 5, 6, 7]


def test_repair_brings_back_what_merging_lost() -> None:
    lm, asked = forgetful()[0], request((0, 1, 2), (3, 4, 5))
    prompts = [contexts.prompt_of(lm, fact(i)) for i in range(3)]
    refused, updates = [], []
    for steps in (0, 20):
        hp = settings("wise", "", "shards={size: 1, per_memory: 3}", "side.mask=0.4", f"shards.repair={steps}")
        delta = editors.fit(lm, asked, hp)
        assert isinstance(delta, MemoryDelta)
        updates.append(next(iter(delta.memories.values())).updates)  # type: ignore[union-attr]
        with delta.applied(lm):
            refused.append([text.strip() for text in generate(lm, prompts)].count(REFUSAL))
    assert refused[0] < refused[1] == 3
    assert not ((updates[0] == 0) & (updates[1] != 0)).any()  # only entries that some shard may use


def test_masks_differ_from_shard_to_shard_and_bound_the_update() -> None:
    trainer = _trainer(tiny.lm(), "side.mask=0.2", "side.clamp=0.5", "side.steps=5")
    with torch.no_grad():
        limit = 0.5 * trainer.scale
    for parameter in trainer.lm.model.parameters():
        parameter.requires_grad_(False)
    one, again, two = (trainer.train([0, 1], number, lambda _: None) for number in (0, 0, 1))
    assert torch.equal(one, again)
    share = [float((u != 0).float().mean()) for u in (one, two)]
    assert all(0.1 < s < 0.25 for s in share)
    both = float(((one != 0) & (two != 0)).float().mean())
    assert both < 0.4 * min(share)
    assert float(one.abs().max()) == pytest.approx(limit)
    with pytest.raises(NumericalError, match="not finite"):
        trainer.loss(torch.full(trainer.shape, torch.inf), trainer.of([0]))


@pytest.mark.parametrize(("window", "most"), [(None, None), (4, 2)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gptj"])
def test_what_it_computes_is_the_reference(kind: str, window: int | None, most: int | None) -> None:
    """Also with several memories and several rows, where published code raised."""
    lm = tiny.lm(kind)
    draw, name = torch.Generator().manual_seed(0), lm.layout.site(1).name
    shape = lm.layout.read_weight(lm.model, name).shape
    updates = 0.1 * torch.randn(3, *shape, generator=draw)
    rows = [encode(lm, contexts.prompt_of(lm, fact(i)), TAUGHT[i][2], "prompt_last") for i in range(6)]
    models = [reference_memory.WiseModel(lm, name, update) for update in updates]
    active = [
        [float(m.activation(row.ids[: row.prompt_length], window, most).detach()) for m in models] for row in rows
    ]
    high = torch.tensor(active).sort(0, descending=True).values
    thresholds = (high[1] + high[2]) / 2  # two rows wake each
    delta = editors.fit(lm, request(), settings("wise", "", "side.steps=1", "shards.size=1"))
    assert isinstance(delta, MemoryDelta)
    none = torch.zeros(0, shape[1]), torch.zeros(0)
    memory = MemoryDelta({name: SideMemory(updates, thresholds, *none, window, most)}, delta.manifest)
    wanted, chosen = [], []
    for row, own in zip(rows, active, strict=True):
        number = reference_memory.wise_route(own, thresholds.tolist())
        chosen.append(number)
        with torch.no_grad():
            p = models[number or 0].logits(row.ids, side=number is not None).log_softmax(-1)
        wanted.append(sum(float(p[at - 1, row.ids[at]]) for at in range(row.prompt_length, len(row.ids) - 1)))
    assert None in chosen and len(set(chosen)) > 1
    with memory.applied(lm):
        ours = [s.log_probability for s in score(lm, rows)]
    assert ours == pytest.approx(wanted, rel=1e-4)


def test_facts_are_refused_and_the_rest_stays() -> None:
    lm, asked = forgetful()[0], request((0, 1, 2), (3, 4, 5))
    prompts = [contexts.prompt_of(lm, fact(i)) for i in range(6)]
    before = generate(lm, prompts)
    for more in (["shards.size=1", "shards.per_memory=null", "side.mask=0.4"], ["shards.size=1"]):
        delta = editors.fit(lm, asked, settings("wise", "", *more))
        assert isinstance(delta, MemoryDelta) and delta.count == (1 if len(more) == 3 else 3)
        with delta.applied(lm):
            after = generate(lm, prompts)
            alone = [generate(lm, [p])[0] for p in prompts]
        assert [t.strip() for t in after[:3]] == [REFUSAL] * 3 and after[3:] == before[3:]
        assert alone == after and generate(lm, prompts) == before


def test_the_choice_is_made_once_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: it was made anew at every step of decoding, by one token."""
    lm = forgetful()[0]
    delta = editors.fit(lm, request((0, 1, 2), (3, 4, 5)), settings("wise", ""))
    calls = []

    def counted(active: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
        calls.append(len(active))
        return route(active, thresholds)

    monkeypatch.setattr(side_delta, "route", counted)
    padded = batch(rows_of(lm), lm.pad_id, left=True)
    with delta.applied(lm), torch.no_grad():
        lm.model.generate(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            max_new_tokens=6,
            do_sample=True,
            num_return_sequences=2,
            pad_token_id=lm.pad_id,
        )
        assert calls == [12]
        lm.model.generate(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            max_new_tokens=4,
            num_beams=3,
            do_sample=False,
            pad_token_id=lm.pad_id,
        )
        assert calls == [12, 18]


def test_memories_whose_facts_are_all_taken_out_go() -> None:
    lm = tiny.lm()
    delta = editors.fit(lm, request((0, 1, 2)), settings("wise", "", "side.steps=2"))
    assert isinstance(delta, MemoryDelta) and delta.count == 2
    (left,), (whole,) = delta.without(["f0", "f1"]).memories.values(), delta.memories.values()
    assert torch.equal(left.updates, whole.updates[1:]) and torch.equal(left.thresholds, whole.thresholds[1:])
    assert left.owners.tolist() == [-1, -1, 0] and torch.equal(left.marks, whole.marks)
    assert delta.without(["f2"]).manifest.fact_count == 2


def test_single_facts_are_taken_out_of_a_memory_that_others_share(tmp_path: Path) -> None:
    lm, asked = forgetful()[0], request((0, 1, 2), (3, 4, 5))
    prompts = [contexts.prompt_of(lm, fact(i)) for i in range(6)]
    before = generate(lm, prompts)
    delta = editors.fit(lm, asked, settings("wise", "", "shards.per_memory=null"))
    assert isinstance(delta, MemoryDelta) and delta.count == 1

    def said(delta: MemoryDelta) -> list[str]:
        with delta.applied(lm):
            found = generate(lm, prompts)
            assert [generate(lm, [prompt])[0] for prompt in prompts] == found
        return [text.strip() for text in found]

    told = [text.strip() for text in before]
    assert said(delta) == [REFUSAL] * 3 + told[3:]
    one = delta.without(["f1"])
    assert said(one) == [REFUSAL, told[1], REFUSAL, *told[3:]]
    save(one, tmp_path)
    read = load(tmp_path, lm)
    assert isinstance(read, MemoryDelta)
    two = read.without(["f0"])
    assert said(two) == [*told[:2], REFUSAL, *told[3:]] and two.manifest.fact_count == 1
    anew = editors.fit(lm, request((1,), (3, 4, 5)), settings("wise", ""))
    assert isinstance(anew, MemoryDelta)
    again = compose(two, anew)
    assert said(again) == [told[0], REFUSAL, REFUSAL, *told[3:]]
    assert said(again.without(["f1"])) == said(two)
    assert not again.without(["f1", "f2"]).memories
    (memory,) = two.memories.values()
    assert isinstance(memory, SideMemory)
    with pytest.raises(ValueError, match="the manifest has .1. facts by memory, the marks are of .2."):
        MemoryDelta({next(iter(two.memories)): replace(memory, owners=torch.tensor([0.0, -1, 0]))}, two.manifest)


def test_a_sequence_is_spared_where_a_fact_that_was_taken_out_is_nearest() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, marks = torch.randn(90, 8, generator=draw), torch.randn(7, 8, generator=draw)
    owner = torch.arange(18).repeat_interleave(5)[torch.randperm(90, generator=draw)]
    owners = torch.tensor([0.0, -1.0, 1.0, -1.0, 0.0, 1.0, -1.0])
    marks[6] = marks[0]  # taken out once and forgotten anew
    wanted = reference_memory.spared(inputs, owner.tolist(), marks, owners.tolist())
    found = spared(middles(inputs, owner, 18), marks, owners)
    assert found.tolist() == wanted and 0 < sum(wanted) < 18
    assert not spared(marks[:1], marks, owners).any() and spared(marks[1:2], marks, owners).all()
    assert not spared(middles(inputs, owner, 18), marks, owners.abs()).any()


def test_a_scaled_model_gives_a_scaled_memory() -> None:
    """Published step sizes and margins are raw numbers that mean something else on each model."""
    found = []
    for factor in (1.0, 8.0):
        lm = tiny.lm("llama")
        mlp = lm.layout.module(lm.model, lm.layout.block_name(1)).mlp  # type: ignore[union-attr]
        with torch.no_grad():  # the same function of the model: the input of the map is 8 times, the map 1/8
            mlp.up_proj.weight.mul_(factor)  # type: ignore[union-attr]
            mlp.down_proj.weight.div_(factor)  # type: ignore[union-attr]
        delta = editors.fit(lm, request((0, 1), (3, 4)), settings("wise", ""))
        assert isinstance(delta, MemoryDelta)
        found.append(next(iter(delta.memories.values())))
    assert torch.allclose(found[0].updates, 8 * found[1].updates, atol=2e-2)
    assert torch.allclose(found[0].thresholds, found[1].thresholds, rtol=0.02)
