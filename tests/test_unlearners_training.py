"""The training loop of the unlearners: equal to plain training, resumed, stopped in time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import delta_samples as samples
import pytest
import torch
from edits import TAUGHT, Killed, request
from unlearning import ASKED, lm, probability, same, settings

from editunlearn import methods
from editunlearn.console import Console
from editunlearn.deltas.changes import Changes
from editunlearn.deltas.files import load
from editunlearn.deltas.lowrank import LowRankDelta
from editunlearn.errors import NumericalError
from editunlearn.lm.weights import linear_maps, read_weight
from editunlearn.unlearners import parameters, rows, training
from editunlearn.unlearners.passes import Passes
from editunlearn.unlearners.training import Training, schedule
from editunlearn.workspace import Workspace


def literal_training(model: Any, hp: Any, updates: int, pairs: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """GradDiff on one fact and one fact to keep an update, by torch alone, in the blocks' own weights."""
    names = linear_maps(model.model, model.layout.blocks)
    weights = [model.model.get_submodule(name).weight for name in names]
    before = [w.detach().clone() for w in weights]
    adam = torch.optim.AdamW(
        [{"params": [w], "lr": hp.train.lr * float(w.detach().square().mean().sqrt())} for w in weights],
        lr=1.0,
        weight_decay=0.0,
    )

    def nll(number: int) -> torch.Tensor:
        prompt, _, answer = TAUGHT[number]
        head = model.tokenizer(prompt)["input_ids"]
        tail = model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        log_p = model.model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        return -torch.stack([log_p[len(head) - 1 + i, token] for i, token in enumerate(tail)]).mean()

    for forget, keep in pairs[:updates]:
        adam.zero_grad()
        (nll(keep) - nll(forget)).backward()
        torch.nn.utils.clip_grad_norm_(weights, hp.train.clip)
        adam.step()
    return {name: (w - b).detach() for name, w, b in zip(names, weights, before, strict=True)}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loop_is_plain_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against AdamW on the weights themselves; GPT-2 stores them transposed."""
    hp = settings("graddiff", "train.batch=1", "train.epochs=2")
    asked = request((0, 1, 2), (3, 4, 5))
    pairs: list[tuple[int, int]] = []
    own = Training._rows

    def see(self: Training, term: Any, facts: Any) -> Any:
        found = own(self, term, facts)
        if term.name == "retain":
            pairs.append((facts[0], 3 + found[0][0]))
        return found

    monkeypatch.setattr(Training, "_rows", see)
    delta = methods.fit(lm(kind), asked, hp)
    expected = literal_training(lm(kind), hp, 6, pairs)
    assert len(pairs) == 6 and expected.keys() == delta.factors.keys()
    for name, change in delta.factors.items():
        wanted = expected[name].T if kind == "gpt2" else expected[name]
        assert float((change.left - wanted).norm() / wanted.norm()) < 2e-3, name


def test_lora_is_that_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same factors at the beginning, the same loss: the same updates as through the library."""
    peft = pytest.importorskip("peft")
    hp = settings("ga", "train.what=lora", "train.rank=4", "train.alpha=8", "train.scale=absolute", "train.lr=0.01")
    hp = hp.model_copy(update={"train": hp.train.model_copy(update={"batch": 1, "epochs": 2, "clip": None})})
    asked = request((0,), (3,))
    started: list[dict[str, torch.Tensor]] = []
    init = parameters.Adapters.__init__

    def see(self: Any, *args: Any) -> None:
        init(self, *args)
        started.append({name: value.detach().clone() for name, value in self.values.items()})

    monkeypatch.setattr(parameters.Adapters, "__init__", see)
    delta = methods.fit(lm(), asked, hp)
    assert isinstance(delta, LowRankDelta)
    other = lm()
    names = linear_maps(other.model, other.layout.blocks)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=0.0)
    adapted = peft.get_peft_model(other.model, config)
    layers = {n: adapted.get_submodule(f"base_model.model.{n}") for n in names}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(started[0][f"{name}.right"])
    trained = [p for p in adapted.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    row = rows.answer_row(other, asked.facts[0])
    for _ in range(2):
        log_p = adapted(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        at = range(row.prompt_length, len(row.ids))
        loss = torch.stack([log_p[i - 1, row.ids[i]] for i in at]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    for name, layer in layers.items():
        theirs = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        ours = delta.factors[name].left @ delta.factors[name].right
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3, name


def test_tokens_at_a_time_change_memory_and_not_results() -> None:
    for method in ("dpo", "kto", "kl"):
        sizes = [16, 4096]
        made = [
            methods.fit(lm(), ASKED, settings(method, "train.epochs=1", "train.batch=3", f"batch_tokens={n}"))
            for n in sizes
        ]
        for name, change in made[0].factors.items():
            other = made[1].factors[name].left
            assert float((change.left - other).norm() / other.norm()) < 0.02, (method, name)


@pytest.mark.parametrize("method", ["npo", "pdu", "rmu", "kl"])
@pytest.mark.parametrize("what", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    method: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WORK_PER_SAVING", 0.0)
    # a price of 0 lets all of the epochs' ends count
    more = ["price.warmup=0", "price.allowed=0"] if method == "pdu" else []
    more += [f"train.what={what}", "train.modules=[]"]
    hp = settings(method, "train.epochs=3", *more, "train.schedule=cosine", "train.warmup=0.2")
    whole = methods.fit(lm(), ASKED, hp)
    for at in range(1, 6):  # 2 updates an epoch

        class Loud(Console):
            def detail(self, message: str, level: int = 1, at: int = at) -> None:
                if message.startswith(f"update {at}:"):
                    raise Killed

        with pytest.raises(Killed):
            methods.fit(lm(), ASKED, hp, work=Workspace(tmp_path / str(at), {}), console=Loud(quiet=True))
        said: list[str] = []
        listening = Console(quiet=True)
        monkeypatch.setattr(listening, "info", said.append)
        again = methods.fit(lm(), ASKED, hp, work=Workspace(tmp_path / str(at), {}), console=listening)
        assert same(whole, again), at
        assert (f"training: going on after {at - 1} updates" in said) == (at > 1)


def test_stops_when_enough_is_forgotten() -> None:
    model, said = lm(), list[str]()
    console = Console(quiet=True)
    console.info = said.append  # type: ignore[assignment,method-assign]
    rule = ["train.epochs=50", "stop={probability: 0.05}", "train.lr=0.003"]
    delta = methods.fit(model, ASKED, settings("graddiff", *rule), console=console)
    with delta.applied(model):
        found = probability(model, ASKED.facts)
    assert 0 < found <= 0.05
    assert any("enough is forgotten after" in line for line in said)
    longer = methods.fit(lm(), ASKED, settings("graddiff", *rule, "stop.probability=0.0001"))
    assert max(n or 0 for n in longer.norms().values()) > max(n or 0 for n in delta.norms().values())


def test_a_change_that_grows_too_large_stops_and_keeps_what_was_well(tmp_path: Path) -> None:
    model = lm()
    weights = samples.snapshot(model.model)
    hp = settings("ga", "train.lr=0.1", "limits.norm=0.35", "train.epochs=30")
    reason = r"after epoch \d+ the change is .* above limits.norm .0.35..*diverged"
    with pytest.raises(NumericalError, match=reason) as e:
        methods.fit(model, ASKED, hp, work=Workspace(tmp_path, {}))
    samples.assert_same(model.model, weights)
    (where,) = tmp_path.glob("*/last_good")
    assert str(where) in str(e.value)
    delta = load(where, model)
    assert 0 < max(n or 0 for n in delta.norms().values()) <= 0.35
    with delta.applied(model):
        assert probability(model, ASKED.facts) < 0.5


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_training(what: str, tmp_path: Path, monkeypatch: Any) -> None:
    from editunlearn.unlearners import losses

    own, calls = losses.ascent, [0]

    def breaks(now: Any) -> torch.Tensor:
        calls[0] += 1
        found = own(now)
        if calls[0] < 4:
            return found
        return found * math.nan if what == "loss" else found + (now.nll.sum() * 0).sqrt()

    monkeypatch.setattr(losses, "ascent", breaks)
    hp = settings("ga", "train.batch=3", "train.epochs=6")
    with pytest.raises(NumericalError, match=f"{what} is n.*t? ?finite|loss is nan.*update 4") as e:
        methods.fit(lm(), ASKED, hp, work=Workspace(tmp_path, {}))
    assert "after update 3" in str(e.value)
    calls[0] = 3
    with pytest.raises(NumericalError, match="Nothing was learned before that"):
        methods.fit(lm(), ASKED, hp)


def test_in_bfloat16_what_is_trained_is_what_is_merged() -> None:
    """The model computes with the weights that a merge gives it; the change itself keeps what rounding drops."""
    model = lm(dtype=torch.bfloat16)
    names, _ = parameters.trained_modules(model.model, model.layout, settings("ga"))
    trained = Changes(model, names)
    draw = torch.Generator().manual_seed(0)
    for value in trained.values.values():
        value += 0.003 * torch.randn(value.shape, generator=draw)
    trained.refresh()
    with trained.active():
        seen = samples.logits(model.model)
    from editunlearn.deltas.dense import make_dense

    delta = make_dense(
        model, trained.updates(), method="ga", hparams={}, facts=ASKED.facts, target_strategy="", seeds={}
    )
    with delta.applied(model):
        assert torch.equal(samples.logits(model.model), seen)
    assert not torch.equal(samples.logits(model.model), seen)
    small = methods.fit(model, ASKED, settings("npo", "train.epochs=2"))
    assert all(change.left.dtype == torch.float32 for change in small.factors.values())
    step = 2.0**-9 * read_weight(model.model, names[0]).float().abs()
    change = small.factors[names[0]].left.abs()
    assert bool(((change > 0) & (change < step)).any()), "nothing was kept below a rounding step"


def test_the_price_of_what_is_kept_follows_its_loss() -> None:
    model = lm()
    for allowed, rises in ((0.0, True), (50.0, False)):
        hp = settings("pdu", f"price={{start: 2.0, rate: 5.0, allowed: {allowed}, warmup: 1}}", "train.epochs=3")
        objective = hp.objective(model, ASKED)
        pools = {name: objective.pools[name]() for name in ("forget", "retain")}
        trained = Changes(model, linear_maps(model.model, "model.layers"))
        run = Training(
            Passes(model, trained, pools, 999), trained, objective.terms, hp, Workspace(None, {}), Console(quiet=True)
        )
        ended = run.run()
        assert (run.prices["retain"] > 2.0) if rises else run.prices["retain"] == 0.0
        assert ended.updates == 6 and ended.losses.keys() == {"forget", "retain"} and ended.tokens > 100


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules(kind: str) -> None:
    rates = [schedule(step, 10, kind, 0.0) for step in range(1, 11)]
    assert rates[0] == 1.0 and all(a >= b for a, b in zip(rates, rates[1:], strict=False)) and rates[-1] > 0
    assert (rates[-1] < 0.2) == (kind != "constant")
    warm = [schedule(step, 10, kind, 0.3) for step in range(1, 11)]
    assert warm[:4] == [0.25, 0.5, 0.75, 1.0] and warm[4] <= 1.0
