"""UnKE: its training step against a literal one, on every architecture, interrupted and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_block
import tiny
import torch
from delta_samples import assert_same, snapshot
from edits import BLOCK, Killed, fact, nll, relative, request, settings
from runs import FACTS, build, call
from test_memory import forgetful

from editunlearn import editors
from editunlearn.console import Console
from editunlearn.deltas.dense import DenseDelta
from editunlearn.deltas.files import load, save
from editunlearn.editors import block_flow
from editunlearn.editors.earlier import Earlier
from editunlearn.editors.past import PastKeys
from editunlearn.errors import InputError, UnsupportedError
from editunlearn.facts.records import ForgetRequest
from editunlearn.lm.tokens import Row
from editunlearn.lm.weights import linear_maps
from editunlearn.workspace import Workspace


def made(lm: Any, *set_: str, forget: tuple[int, ...] = (0, 1, 2), **options: Any) -> DenseDelta:
    delta = editors.fit(lm, request(forget, (3, 4)), settings("unke", "", *set_), **options)
    assert isinstance(delta, DenseDelta)
    return delta


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("method", BLOCK)
def test_matrix(method: str, kind: str) -> None:
    lm = tiny.lm(kind)
    before, state = snapshot(lm.model), torch.random.get_rng_state()
    delta = made(lm)
    assert_same(lm.model, before)
    assert torch.equal(torch.random.get_rng_state(), state) and all(p.grad is None for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert sorted(delta.factors) == sorted(linear_maps(lm.model, lm.layout.block_name(1)))
    assert delta.manifest.method == method and delta.count > 0
    plain = nll(lm, request().facts)
    with pytest.raises(KeyError), delta.applied(lm):
        assert nll(lm, request().facts) < plain - 0.01
        raise KeyError
    assert_same(lm.model, before)


ROWS = [((0, 11, 12, 13, 14, 15, 16), (6,)), ((0, 21, 22), (2,)), ((0, 31, 32, 33, 34), (1, 4))]
KEPT = [(0, 41, 42, 43), (0, 51)]


@pytest.mark.parametrize("tokens", [2048, 1])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3_text", "phi", "bloom"])
def test_loss_and_steps_are_the_papers(kind: str, tokens: int) -> None:
    """Defect: of a block that returns a tensor its first batch element was taken, and broadcast against all rows."""
    lm, steps = tiny.lm(kind), 3
    train = "train={steps: 3, lr: 0.002, scale: absolute, weight_decay: 0.1, kept: 0.7}"
    hp = settings("unke", "", train, f"batch_tokens={tokens}")
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    draw = torch.Generator().manual_seed(5)
    moves = [torch.randn(len(at), 32, generator=draw) for _, at in ROWS]
    goals = [(ids, at, move, 0.4) for (ids, at), move in zip(ROWS, moves, strict=True)]
    facts = [block_flow.Lesson(Row(ids, at[-1], len(ids)), at, move, w) for ids, at, move, w in goals]
    kept = [block_flow.Lesson(Row(ids, 0, len(ids))) for ids in KEPT]
    name = lm.layout.block_name(1)
    trainer = block_flow.Trainer(lm, hp, name, facts, kept, Workspace(None, {}), Console(quiet=True))
    assert len(trainer.facts) == (1 if tokens > 1 else 3)
    assert sum(len(piece.wanted) for piece in trainer.facts) == 15  # each token of each row, and no padding
    literal = reference_block.UnkeBlock(lm, name)
    both = literal.goals(goals), literal.goals([(ids, (), None, 1.0) for ids in KEPT])
    assert trainer.loss() == pytest.approx(float(literal.loss(*both, 0.7, moves).detach()), rel=1e-4)
    for value in trainer.changes.values.values():
        value.grad = None
    ours = trainer.train()
    theirs = literal.train(*both, 0.7, moves, lr=0.002, decay=0.1, steps=steps)
    assert sorted(ours) == sorted(theirs)
    for module, change in theirs.items():
        if float(change.norm()) > 1e-4:
            assert relative(ours[module].left, change) < 0.02, module


def test_it_forgets_and_the_block_gives_the_values() -> None:
    said: list[str] = []
    lm, asked = forgetful()
    console = Console(quiet=True)
    console.info = said.append  # type: ignore[method-assign]
    hp = settings("unke", "", "train.steps=60", "value={steps: 40, kl: 0, lr: 0.5}")
    delta = editors.fit(lm, asked, hp, console=console)
    plain = nll(lm, asked.facts)
    with delta.applied(lm):
        assert nll(lm, asked.facts) < 0.5 * plain
    given = next(text for text in said if text.startswith("block: ") and "values are given" in text)
    assert int(given.split()[1].rstrip("%")) > 50


def test_chunks_are_written_in_one_row() -> None:
    lm, long = tiny.lm(), "The author of the novel was born in Taipei, and lives in Berlin with three children."
    asked = ForgetRequest((fact(0, long), fact(1)), (fact(3, None),))
    delta = editors.fit(lm, asked, settings("unke", "", "chunks.size=6", "train.steps=40"))
    plain = nll(lm, asked.facts)
    with delta.applied(lm):
        assert nll(lm, asked.facts) < plain - 0.5


@pytest.mark.parametrize("stop", [2, 11])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    lm = tiny.lm()
    monkeypatch.setattr(block_flow, "SAVE_EVERY", 1)
    whole, loss, calls = made(lm), block_flow.Trainer.loss, []

    def killed(self: Any) -> float:
        calls.append(1)
        if len(calls) == stop:
            raise Killed
        return loss(self)

    monkeypatch.setattr(block_flow.Trainer, "loss", killed)
    with pytest.raises(Killed):
        made(lm, work=Workspace(tmp_path, {"run": 1}))
    resumed = made(lm, work=Workspace(tmp_path, {"run": 1}))
    assert len(calls) == 12 + 1  # the step that was killed, and no other, is made again
    assert all(torch.equal(whole.factors[n].left, resumed.factors[n].left) for n in whole.factors)


def test_going_on(tmp_path: Path) -> None:
    lm = tiny.lm()
    first = made(lm, forget=(0, 1), store_facts=True)
    save(first, tmp_path / "first")
    earlier = Earlier.load(tmp_path / "first")
    held = ForgetRequest((fact(2),), (fact(3, None),), earlier=(fact(0), fact(1)))
    both, past = editors.run(lm, held, settings("unke", "", "train.steps=30"), earlier=earlier)
    assert isinstance(both, DenseDelta) and both.manifest.fact_count == 3 and not past.keys
    plain = nll(lm, [fact(0), fact(1)]), nll(lm, [fact(2)])
    with both.applied(lm):
        assert nll(lm, [fact(0), fact(1)]) < plain[0] - 0.01 and nll(lm, [fact(2)]) < plain[1] - 0.01
    save(both, tmp_path / "both")
    assert torch.equal(next(iter(load(tmp_path / "both").tensors().values())), next(iter(both.tensors().values())))
    with pytest.raises(UnsupportedError, match="cannot be taken out alone"):
        both.without(["f0"])


def test_what_it_has_no_use_for(text: str) -> None:
    lm, hp = tiny.lm(), settings("unke", "")
    with pytest.raises(InputError, match="leave --past out"):
        editors.fit(lm, request(), hp, past=PastKeys({lm.layout.site(1).name: torch.zeros(1, 88)}))
    low = Earlier(*editors.run(lm, request(), settings("memit", text)))
    with pytest.raises(UnsupportedError, match="was made by memit"):
        editors.fit(lm, request((5,)), hp, earlier=low)
    dense = Earlier(made(lm), PastKeys())
    with pytest.raises(UnsupportedError, match="was made by unke"):
        editors.fit(lm, request((5,)), settings("memit", text), earlier=dense)
    with pytest.raises(InputError, match="one layer"):
        settings("unke", "", "layers=[0, 1]")


def test_the_commands(tmp_path: Path) -> None:
    world = build(tmp_path / "world")
    lines = (world.root / "facts.jsonl").read_text().splitlines()
    assert len(lines) == len(FACTS) > 1
    (tmp_path / "one.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "others.jsonl").write_text("\n".join(lines[1:]) + "\n")
    few = ["layers=[1]", "context_prefixes.count=0", "value.steps=3", "train.steps=3", "keep=10", "texts=1"]
    flags = ["--hparams", "unke", "--model", str(world.model), "--cache-dir", str(world.cache)]
    flags += [word for item in few for word in ("--set", item)]
    first = [*flags, "--facts", str(tmp_path / "one.jsonl")]
    planned = call("apply", *first, "--dry-run")
    assert planned.code == 0, planned.err
    assert "the block, with the optimiser" in planned.out and "work: block" in planned.out
    done = call("apply", *first, "--store-facts", "--evaluate", "none", "--out", str(tmp_path / "first"))
    assert done.code == 0, done.err
    more = [*flags, "--facts", str(tmp_path / "others.jsonl"), "--continue", str(tmp_path / "first")]
    done = call("apply", *more, "--evaluate", "none", "--out", str(tmp_path / "both"))
    assert done.code == 0, done.err
    assert load(tmp_path / "both").manifest.fact_count == len(FACTS)
