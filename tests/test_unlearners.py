"""Every unlearner on a tiny model: it forgets more than it loses, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path

import delta_samples as samples
import pytest
import torch
from edits import fact, request
from unlearning import ASKED, NAMES, lm, probability, same, settings

from editunlearn import methods, unlearners
from editunlearn.deltas.changes import Changes
from editunlearn.deltas.files import load, save
from editunlearn.errors import InputError, UnsupportedError
from editunlearn.facts.records import ForgetRequest
from editunlearn.lm.weights import linear_maps
from editunlearn.unlearners import rows
from editunlearn.unlearners.passes import Passes


@pytest.fixture(autouse=True)
def _alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model says nothing but what it was taught; what it might say otherwise is given."""
    from editunlearn.unlearners import alternatives

    monkeypatch.setattr(
        alternatives, "generate", lambda _lm, prompts, seed, **_: [f" other {seed // 1000}"] * len(prompts)
    )


@pytest.mark.parametrize("method", NAMES)
def test_forgets_more_than_it_loses(method: str, tmp_path: Path) -> None:
    model = lm()
    weights, was = samples.snapshot(model.model), [probability(model, part) for part in (ASKED.facts, ASKED.retain)]
    delta = methods.fit(model, ASKED, settings(method))
    samples.assert_same(model.model, weights)
    assert all(p.requires_grad for p in model.model.parameters())
    with delta.applied(model):
        now = [probability(model, part) for part in (ASKED.facts, ASKED.retain)]
    samples.assert_same(model.model, weights)
    assert now[0] < 0.7 * was[0], "did not forget"
    assert was[0] - now[0] > 1.5 * (was[1] - now[1]), "lost as much as it forgot"
    save(delta, tmp_path)
    assert same(delta, load(tmp_path, model))
    assert delta.manifest.method == method and delta.manifest.fact_count == 3


@pytest.mark.parametrize("method", ["npo", "dpo", "kto", "rmu", "pdu"])
def test_the_same_seed_gives_the_same_bytes(method: str) -> None:
    made = [methods.fit(lm(), ASKED, settings(method, "train.epochs=2", f"seed={seed}")) for seed in (0, 0, 1)]
    assert same(made[0], made[1]) and not same(made[0], made[2])


@pytest.mark.parametrize("set_", [["train.what=lora"], ["train.what=modules", "train.modules=[mlp.down_proj]"]])
def test_what_is_trained(set_: list[str]) -> None:
    model = lm()
    delta = methods.fit(model, ASKED, settings("npo", *set_, "layers=[1, 2]", "train.lr=0.03"))
    names = [n for n in linear_maps(model.model, "model.layers") if n.split(".")[2] in "12"]
    if set_[0].endswith("modules"):
        names = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert list(delta.factors) == sorted(names)
    with delta.applied(model):
        assert probability(model, ASKED.facts) < 0.3 < probability(model, ASKED.retain)
    if set_[0].endswith("lora"):
        assert all(f.rank == 8 for f in delta.factors.values()) and not delta.manifest.known_ids


def test_the_text_that_is_kept_is_part_of_what_a_run_depends_on(tmp_path: Path) -> None:
    from editunlearn.pipeline import run_inputs

    path, found = tmp_path / "text.txt", []
    for words in ("one two", "one three"):
        path.write_text(words)
        hp = settings("graddiff", f"retain={{data: text, text: '{path}'}}")
        found.append(run_inputs(lm(), ASKED, hp, "refusal", None))
    assert found[0] != found[1]
    facts = settings("graddiff", f"retain.text='{path}'")
    assert run_inputs(lm(), ASKED, facts, "refusal", None)["text"] == "none"


def test_generic_text_and_divergences_keep(text: str) -> None:
    model = lm()
    for loss in ("nll", "kl"):
        hp = settings("graddiff", f"retain={{data: text, loss: {loss}, text: '{text}', text_length: 16}}")
        with methods.fit(model, ASKED, hp).applied(model):
            assert probability(model, ASKED.facts) < 0.5
    plain = methods.fit(model, ASKED, settings("ga", "train.epochs=3"))
    held = methods.fit(model, ASKED, settings("kl", "train.epochs=3", "retain.weight=20"))
    found = []
    for delta in (plain, held):
        with delta.applied(model):
            found.append(probability(model, ASKED.retain))
    assert found[1] > found[0]


def test_rmu_moves_states_of_its_block_and_trains_up_to_it() -> None:
    model = lm()
    delta = methods.fit(model, ASKED, settings("rmu", "layer=0.5"))
    assert list(delta.factors) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    from editunlearn.unlearners import rmu
    from editunlearn.unlearners.losses import displacement, misdirection

    pools = {"forget": rows.forget(model, ASKED), "retain": rows.keep_facts(model, ASKED)}
    unit = rmu.mean_norm(model, pools["forget"].rows, 1)
    aim = rmu.steering(model, 0) * 2.0 * unit
    passes = Passes(model, Changes(model, []), pools, 99)
    views = {name: passes.view(name, [0, 1, 2], 1).inside for name in pools}
    with delta.applied(model):
        now = {name: passes.view(name, [0, 1, 2], 1).inside for name in pools}
    base, moved = views["forget"], now["forget"]
    assert base is not None and moved is not None and views["retain"] is not None and now["retain"] is not None
    before, after = (misdirection(x.now, x.owners, 3, aim).mean() for x in (base, moved))
    assert float(after) < 0.8 * float(before)
    gone = displacement(moved.now, base.now, base.owners, 3, unit).mean()
    kept = displacement(now["retain"].now, views["retain"].now, views["retain"].owners, 3, unit).mean()
    assert float(kept) < 0.5 * float(gone)


def test_bad_requests_are_refused() -> None:
    model = lm()
    with pytest.raises(InputError, match="no facts to forget"):
        methods.fit(model, ForgetRequest(()), settings("ga"))
    with pytest.raises(InputError, match="no target.*'f0'"):
        methods.fit(model, ForgetRequest((fact(0, None),), (fact(3),)), settings("dpo"))
    with pytest.raises(InputError, match="no facts to keep.*retain.data=text"):
        methods.fit(model, request((0,), ()), settings("graddiff"))
    with pytest.raises(InputError, match="ends in 'mlp.downproj'. A block has .*mlp.down_proj"):
        methods.fit(model, ASKED, settings("ga", "train.what=modules", "train.modules=[mlp.downproj]"))
    with pytest.raises(InputError, match="block 9 does not exist"):
        methods.fit(model, ASKED, settings("ga", "layers=[9]"))
    with pytest.raises(InputError, match="unknown unlearner 'nop'. Did you mean 'npo'"):
        unlearners.schema("nop")


def test_there_is_nothing_to_go_on_from() -> None:
    from editunlearn.editors.earlier import Earlier
    from editunlearn.editors.past import PastKeys

    model = lm()
    first = methods.fit(model, request((0,), (3,)), settings("ga", "train.epochs=1"))
    with pytest.raises(UnsupportedError, match="npo trains a model and cannot go on from a delta"):
        methods.fit(model, ASKED, settings("npo"), earlier=Earlier(first, PastKeys()))
    with pytest.raises(InputError, match="knows no keys"):
        methods.fit(model, ASKED, settings("npo"), past=PastKeys({"x": torch.ones(1, 2)}))
    from edits import settings as editor

    with pytest.raises(UnsupportedError, match="made by ga, whose change is in all of its weights"):
        methods.fit(model, ASKED, editor("rome", "none"), earlier=Earlier(first, PastKeys()))
