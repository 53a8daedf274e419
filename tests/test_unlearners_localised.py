"""Where to train: scores against their literal form, the control, and what is left alone."""

from __future__ import annotations

from typing import Any

import delta_samples as samples
import pytest
import torch
from unlearning import ASKED, lm, probability, same, settings

from editunlearn import methods
from editunlearn.console import Console
from editunlearn.deltas.changes import Changes
from editunlearn.deltas.lowrank import Dense, Factors
from editunlearn.errors import InputError
from editunlearn.lm.weights import linear_maps
from editunlearn.unlearners import localise, losses, parameters, probe, rows
from editunlearn.unlearners.passes import Passes
from editunlearn.unlearners.training import gradients


def some(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in {"a": (4, 3), "b": (2, 5)}.items()}


def test_gradient_ratio_and_the_largest_of_all() -> None:
    forget, retain = some(0), some(1)
    found = localise.gradient_ratio(forget, retain, 0.5)
    everything = [float(x) for g in retain.values() for x in g.flatten()]
    unit = sum(map(abs, everything)) / len(everything)
    flat = []
    for name in forget:
        for i, j in torch.cartesian_prod(*map(torch.arange, forget[name].shape)).tolist():
            wanted = abs(float(forget[name][i, j])) / (abs(float(retain[name][i, j])) + 0.5 * unit)
            assert float(found[name][i, j]) == pytest.approx(wanted, rel=1e-5)
            flat.append((wanted, name, i, j))
    best = {(name, i, j) for _, name, i, j in sorted(flat, reverse=True)[:6]}  # 0.27 of 22
    masks = localise.largest(found, 0.27)
    assert {(n, *place) for n, mask in masks.items() for place in mask.nonzero().tolist()} == best
    assert sum(int(mask.sum()) for mask in localise.largest(found, 1e-9).values()) == 1


def test_the_gradient_ratio_does_not_depend_on_the_scale_of_gradients() -> None:
    forget, retain = some(0), some(1)
    small = [{name: 1e-6 * g for name, g in part.items()} for part in (forget, retain)]
    for name, score in localise.gradient_ratio(*small, 0.5).items():
        torch.testing.assert_close(score, localise.gradient_ratio(forget, retain, 0.5)[name])


def test_rows_and_regions() -> None:
    forget = some(0)
    norms = localise.row_norms(forget)
    assert norms["a"].shape == (4, 1) and float(norms["a"][2, 0]) == pytest.approx(float(forget["a"][2].norm()))
    masks = localise.largest(norms, 0.34)  # 2 of 6 rows
    assert localise.chosen(masks, {n: tuple(g.shape) for n, g in forget.items()}) in (6, 8, 10)
    alike = {"a": forget["a"] * 3, "b": -forget["b"]}
    sizes = {name: float(g.abs().mean()) for name, g in forget.items()}
    found = localise.region(forget, alike, 0.92, 0.0, relative=False)
    assert (bool(found["a"]), bool(found["b"])) == (False, True)
    found = localise.region(forget, some(1), 0.92, sizes["b"] + 1e-6, relative=False)
    assert not bool(found["b"]) and bool(found["a"]) == (sizes["a"] > sizes["b"])
    relative = localise.region({n: 1e-5 * g for n, g in forget.items()}, some(1), 0.92, 1.0, relative=True)
    assert sum(map(bool, relative.values())) == 1
    assert localise.cosine(forget["a"], torch.zeros(4, 3)) == 0.0


def test_the_control_is_of_equal_size_and_elsewhere() -> None:
    masks = localise.largest({n: g.abs() for n, g in some(0).items()}, 0.3)
    control = localise.at_random(masks, 0)
    assert {n: m.shape for n, m in control.items()} == {n: m.shape for n, m in masks.items()}
    assert sum(int(m.sum()) for m in control.values()) == sum(int(m.sum()) for m in masks.values())
    again, other = localise.at_random(masks, 0), localise.at_random(masks, 1)
    assert all(torch.equal(control[n], again[n]) for n in masks)
    assert any(not torch.equal(control[n], other[n]) for n in masks)


def gradient(model: Any, pool: rows.Pool) -> dict[str, torch.Tensor]:
    trained = Changes(model, linear_maps(model.model, model.layout.blocks))
    passes = Passes(model, trained, {"rows": pool}, 4096)
    return gradients(passes, trained, "rows", lambda view: losses.nll(view.now), 64, lambda _: None)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_those_of_the_weights(kind: str) -> None:
    model = lm(kind)
    pool = rows.forget(model, ASKED)
    found = gradient(model, pool)
    total = torch.tensor(0.0)
    for row in pool.rows:
        log_p = model.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        at = range(row.prompt_length, len(row.ids))
        total = total - torch.stack([log_p[i - 1, row.ids[i]] for i in at]).mean() / len(pool.rows)
    total.backward()
    for name, ours in found.items():
        theirs = model.model.get_submodule(name).weight.grad
        torch.testing.assert_close(ours, theirs.T if kind == "gpt2" else theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("method", "loss"), [("grin", "npo"), ("grin", "graddiff"), ("sure", "refusal")])
def test_only_what_was_chosen_changes(method: str, loss: str) -> None:
    model = lm()
    weights = samples.snapshot(model.model)
    hp = settings(method, f"loss={loss}", "train.epochs=2", "train.weight_decay=0.1")
    delta = methods.fit(model, ASKED, hp)
    samples.assert_same(model.model, weights)
    pools = [gradient(model, pool) for pool in (rows.forget(model, ASKED), rows.keep_facts(model, ASKED))]
    masks = hp.masks(*pools)
    for name, change in delta.factors.items():
        outside = ~masks[name].expand(change.shape)
        assert not bool(change.left[outside].any()), name
    share = sum(int(c.left.count_nonzero()) for c in delta.factors.values())
    trained = localise.chosen({n: masks[n] for n in delta.factors}, {n: c.shape for n, c in delta.factors.items()})
    assert 0.5 * trained < share <= trained
    control = methods.fit(model, ASKED, hp.model_copy(update={"random": True}))
    places = [{(n, *p) for n, c in d.factors.items() for p in c.left.nonzero().tolist()} for d in (delta, control)]
    assert len(places[0] & places[1]) < 0.8 * len(places[0])


def test_noise_is_put_on_chosen_weights_only() -> None:
    model = lm()
    quiet, loud = (
        methods.fit(model, ASKED, settings("grin", f"noise={noise}", "train.epochs=1", "train.lr=1e-9", "fraction=0.1"))
        for noise in (0, 0.5)
    )
    for name, change in loud.factors.items():
        place = change.left != 0
        unit = float(model.layout.read_weight(model.model, name).square().mean().sqrt())
        if int(place.sum()) > 100:
            assert 0.3 * unit < float(change.left[place].std()) < 0.7 * unit
    assert max(n or 0 for n in quiet.norms().values()) < 1e-6 < 0.1 < max(n or 0 for n in loud.norms().values())


def test_memflex_trains_whole_matrices() -> None:
    model, said = lm(), list[str]()
    console = Console(quiet=True)
    console.info = said.append  # type: ignore[assignment,method-assign]
    delta = methods.fit(model, ASKED, settings("memflex", "magnitude=1.2"), console=console)
    everywhere = linear_maps(model.model, "model.layers")
    assert 0 < len(delta.factors) < len(everywhere)
    assert any(f"in {len(delta.factors)} matrices, chosen by their gradients" in line for line in said)
    control = methods.fit(model, ASKED, settings("memflex", "magnitude=1.2", "random=true"))
    assert len(control.factors) == len(delta.factors) and control.factors.keys() != delta.factors.keys()
    low = methods.fit(model, ASKED, settings("memflex", "magnitude=1.2", "train.what=lora", "train.epochs=1"))
    assert low.factors.keys() == delta.factors.keys()
    with pytest.raises(InputError, match="memflex finds nothing to train"):
        methods.fit(model, ASKED, settings("memflex", "magnitude=100", "scale=absolute"))


def test_memflex_looks_at_answers_with_half_of_their_tokens_replaced() -> None:
    model = lm()
    pool = rows.forget(model, ASKED)
    made = probe.disturbed(model, pool, 3, 0)
    assert len(made.rows) == 9 and made.rows == probe.disturbed(model, pool, 3, 0).rows
    for number, row in enumerate(made.rows):
        own = pool.rows[number // 3]
        length = len(own.ids) - own.prompt_length
        apart = sum(a != b for a, b in zip(row.ids, own.ids, strict=True))
        assert row.ids[: own.prompt_length] == own.ids[: own.prompt_length] and apart <= length // 2
    assert any(row != pool.rows[n // 3] for n, row in enumerate(made.rows))


def test_fila_is_the_largest_part_of_the_weighted_weight() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(12, 9, generator=draw), torch.rand(12, 9, generator=draw) + 0.1
    left, right = probe.fila(weight, importance, 4, 2.0, 0)
    assert left.shape == (12, 4) and right.shape == (4, 9)
    s = torch.stack([importance[i].sum().sqrt() for i in range(12)]).double()
    u, values, vh = torch.linalg.svd(torch.diag(s) @ weight.double())
    wanted = torch.diag(1 / s) @ (u[:, :4] * values[:4]) @ vh[:4]
    torch.testing.assert_close((2.0 * left @ right).double(), wanted, rtol=1e-3, atol=1e-3)


def test_loku_begins_where_the_model_is() -> None:
    model = lm()
    hp = settings("loku", "train.rank=4")
    names = linear_maps(model.model, "model.layers")
    pools = {"forget": rows.forget(model, ASKED), "retain": rows.keep_facts(model, ASKED)}
    trained = parameters.Adapters(model, names, hp.train, 0)
    probe.begin(model, trained, pools, hp, None, Console(quiet=True))
    assert all(bool(value.any()) for value in trained.values.values())
    plain = samples.logits(model.model)
    with trained.active():
        torch.testing.assert_close(samples.logits(model.model), plain, rtol=1e-3, atol=1e-3)
    for found in trained.updates().values():
        assert found.rank == 8 and float((found.left @ found.right).norm()) < 1e-3
    delta = methods.fit(model, ASKED, hp)
    assert all(found.rank == 8 for found in delta.factors.values())


def test_fisher_information_is_of_single_rows() -> None:
    model = lm()
    names = ["model.layers.1.mlp.down_proj"]
    pool = rows.forget(model, ASKED)
    found = probe.fisher(model, Changes(model, names), pool, settings("loku"))[names[0]]
    weight = model.model.get_submodule(names[0]).weight
    total, tokens = torch.zeros_like(weight), 0
    for row in pool.rows:
        model.model.zero_grad()
        log_p = model.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        at = range(row.prompt_length, len(row.ids))
        (-torch.stack([log_p[i - 1, row.ids[i]] for i in at]).mean()).backward()
        total += len(at) * weight.grad**2
        tokens += len(at)
    torch.testing.assert_close(found, total / tokens, rtol=1e-3, atol=1e-9)


def test_a_task_vector_is_what_learning_would_change_taken_off() -> None:
    model = lm()
    for what in ("full", "lora"):
        few = [f"train.what={what}", "train.epochs=2", "train.lr=0.002"]
        once, thrice = (methods.fit(model, ASKED, settings("task_vector", *few, f"factor={f}")) for f in (1, 3))
        for name, update in once.factors.items():
            assert isinstance(update, Dense | Factors)
            torch.testing.assert_close(3 * update.left, thrice.factors[name].left)
        with once.applied(model):
            forgotten = probability(model, ASKED.facts)
        assert forgotten < probability(model, ASKED.facts)
        with thrice.applied(model):
            assert probability(model, ASKED.facts) < forgotten
    with pytest.raises(InputError, match="task_vector trains towards the facts"):
        settings("task_vector", "stop={probability: 0.1}")


def test_a_localised_run_goes_on_to_the_same_bytes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edits import Killed

    from editunlearn.unlearners import training
    from editunlearn.workspace import Workspace

    monkeypatch.setattr(training, "WORK_PER_SAVING", 0.0)

    class Loud(Console):
        def detail(self, message: str, level: int = 1) -> None:
            if message.startswith("update 3:"):
                raise Killed

    for method in ("grin", "loku"):
        hp = settings(method, "train.epochs=2")
        whole = methods.fit(lm(), ASKED, hp)
        with pytest.raises(Killed):
            methods.fit(lm(), ASKED, hp, work=Workspace(tmp_path / method, {}), console=Loud(quiet=True))
        assert same(whole, methods.fit(lm(), ASKED, hp, work=Workspace(tmp_path / method, {})))


def test_entries_of_matrices_are_not_those_of_a_lora() -> None:
    with pytest.raises(InputError, match="grin chooses entries of the weights themselves"):
        settings("grin", "train.what=lora")
    with pytest.raises(InputError, match="loku begins with a LoRA"):
        settings("loku", "train.what=full")
