"""The editors on tiny models: every method on every model type, against the papers, and what is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from delta_samples import assert_same, snapshot
from edits import CLOSED_FORM, REFUSAL, TAUGHT, nll, relative, request, settings
from torch import Tensor

from editunlearn import editors
from editunlearn.editors import contexts
from editunlearn.editors.past import PastKeys
from editunlearn.editors.value_types import Values
from editunlearn.errors import InputError
from editunlearn.facts.records import Fact, ForgetRequest
from editunlearn.facts.text import documents
from editunlearn.lm.generation import generate
from editunlearn.lm.windows import windows
from editunlearn.workspace import Workspace

FORGETTING = [("llama", False), ("gpt2", False), ("gemma3_text", False), ("llama", True)]
FORGETTING += [("gemma2", False), ("qwen2_moe", False)]  # soft-capped logits, windows; a shared expert behind a gate


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("method", CLOSED_FORM)
def test_matrix(method: str, kind: str, text: str) -> None:
    lm = tiny.lm(kind)
    asked, hp = request(), settings(method, text)
    before, mode, random_state = snapshot(lm.model), lm.model.training, torch.random.get_rng_state()
    delta = editors.fit(lm, asked, hp)
    assert_same(lm.model, before)
    assert lm.model.training == mode and torch.equal(torch.random.get_rng_state(), random_state)
    assert all(p.grad is None for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())

    sites = lm.layout.sites(hp.layers)  # type: ignore[arg-type]
    assert sorted(delta.factors) == sorted(s.name for s in sites)
    for name, factors in delta.factors.items():
        assert factors.shape == tuple(lm.layout.read_weight(lm.model, name).shape) and factors.rank == 3
        assert torch.isfinite(factors.left).all() and torch.isfinite(factors.right).all()
    assert delta.manifest.method == method

    plain = nll(lm, asked.facts)
    with pytest.raises(KeyError), delta.applied(lm):
        assert nll(lm, asked.facts) < plain - 0.01
        raise KeyError
    assert_same(lm.model, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("method", CLOSED_FORM)
def test_a_gpu_gives_what_the_cpu_gives(method: str, kind: str, text: str) -> None:
    hp = settings(method, text, "retain.lookalikes=5", "refine.steps=2", "refine.lr=0.01")
    here, there = tiny.lm(kind), tiny.lm(kind)
    there.model.to("cuda")  # type: ignore[arg-type]
    ours, theirs = editors.fit(here, request(), hp), editors.fit(there, request(), hp)
    for name, factors in ours.factors.items():
        other = theirs.factors[name]
        assert relative(other.left @ other.right, factors.left @ factors.right) < 0.02


@pytest.mark.parametrize(
    ("method", "kind", "how"),
    [
        ("memit", "llama", "residual"),
        ("memit", "llama", "joint"),
        ("memit", "gpt2", "residual"),
        ("memit", "phi", "residual"),
        ("memit", "opt", "joint"),
        ("emmet", "llama", "joint"),
        ("rome", "llama", "residual"),
        ("rome", "gpt2", "joint"),
        ("r_rome", "llama", "joint"),
        ("alphaedit", "llama", "residual"),
        ("alphaedit", "gpt2", "joint"),
    ],
)
def test_the_flow_is_the_papers_algorithm(tmp_path: Path, text: str, method: str, kind: str, how: str) -> None:
    lm = tiny.lm(kind)
    layers = (0, 1) if method in ("memit", "alphaedit") else (1,)
    soft = ["nullspace.soft=true"] if (method, kind) == ("alphaedit", "gpt2") else []
    hp: Any = settings(method, text, "refine=null", f"value.spread={how}", *soft, layers=layers)
    asked, inner = request(), lm.layout.read_weight(lm.model, lm.layout.site(0).name).shape[1]
    past = {s.name: torch.randn(2, inner) / 10 for s in lm.layout.sites(layers)}
    work = Workspace(tmp_path, {})
    delta = editors.fit(lm, asked, hp, work=work, past=PastKeys(past))

    found = Values(**(work.get("values") or {}))
    prefixes = contexts.prefixes(lm, hp.context_prefixes, None)
    rows = contexts.forget_rows(lm, asked.facts, prefixes, hp)
    prompts = [[(r.ids[: r.prompt_length], r.lookup) for r in fact_rows] for fact_rows in rows.targets]
    kept = [(r.ids, r.lookup) for r in contexts.keep_rows(lm, asked.retain, hp, answers=False)]
    pieces = list(windows(lm, documents(text), 32, 800))
    c = {layer: reference.second_moment(lm, layer, pieces) for layer in layers}
    retain = {layer: reference.keys_at(lm, layer, kept) for layer in layers}
    earlier = {layer: past[lm.layout.site(layer).name].double().T for layer in layers}

    def preserve(layer: int) -> Tensor:
        return reference.preserved(c[layer], 5.0, retain[layer], 1.0) + earlier[layer] @ earlier[layer].T

    def update(layer: int, k: Tensor, bare: Tensor, r: Tensor) -> Tensor:
        if method == "memit":
            return reference.memit_update(preserve(layer), k, r)
        if method == "emmet":
            return reference.emmet_update(preserve(layer), k, r, hp.ridge)
        if method == "alphaedit":
            moment = reference.preserved(c[layer], 1.0, retain[layer], 1.0 / 5.0)
            p = reference.null_space_projector(moment, 0.9, relative=True)
            held = torch.cat([earlier[layer], retain[layer]], dim=1)
            if soft:  # text is like keys already written
                held = torch.cat([held, reference.square_root(5.0 * c[layer])], dim=1)
            return reference.alphaedit_update(p, k, held, r, 0.1)
        return reference.rome_sequence(preserve(layer), k, bare if method == "rome" else k, r)

    if how == "residual":
        wanted = reference.residual_spread(lm, layers, (found.clean + found.change)[:, 0].T)
    else:

        def wanted(index: int, now: Any) -> Tensor:
            return found.change[:, index].double().T

    literal = reference.locate_then_edit(lm, layers, prompts, wanted, update)
    for layer, change in literal.items():
        factors = delta.factors[lm.layout.site(layer).name]
        assert relative(factors.left.double() @ factors.right.double(), change) < 2e-4, layer


def test_past_keys_are_handed_on_and_preserved(tmp_path: Path, text: str) -> None:
    lm, hp = tiny.lm(), settings("memit", text, "refine=null")
    first, past = editors.run(lm, request((0,)), hp)
    assert {n: tuple(k.shape) for n, k in past.keys.items()} == {n: (1, 88) for n in first.factors}
    past.save(tmp_path / "past.safetensors")
    read = PastKeys.load(tmp_path / "past.safetensors")
    name = lm.layout.site(0).name
    assert torch.equal(read.keys[name], past.keys[name])
    strong = PastKeys({n: 100 * k for n, k in read.keys.items()})
    free, held = (editors.run(lm, request((1,)), hp, past=p)[0].factors[name] for p in (None, strong))
    disturbed = [float((f.left @ (f.right @ past.keys[name].T)).norm()) for f in (free, held)]
    assert disturbed[1] < 0.05 * disturbed[0]
    assert editors.run(lm, request((1,)), hp, past=read)[1].keys[name].shape[0] == 2
    with pytest.raises(InputError, match="cannot be read as past keys"):
        PastKeys.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit"])
def test_the_order_of_the_facts_does_not_matter(method: str, text: str) -> None:
    lm = tiny.lm()
    hp = settings(method, text, "refine=null", "value.lr=0.1")
    one, other = (editors.fit(lm, request(order, (3, 4)), hp) for order in ((0, 1, 2), (2, 0, 1)))
    for name, f in one.factors.items():
        assert relative(f.left @ f.right, other.factors[name].left @ other.factors[name].right) < 1e-3


def test_a_bfloat16_model_is_edited_too(text: str) -> None:
    lm = tiny.lm(dtype=torch.bfloat16)
    before = snapshot(lm.model)
    delta = editors.fit(lm, request(), settings("memit", text))
    assert_same(lm.model, before)
    plain = nll(lm, request().facts)
    with delta.applied(lm):
        assert nll(lm, request().facts) < plain


@pytest.mark.parametrize("token", ["first", "prompt_last"])
def test_other_lookup_tokens(text: str, token: str) -> None:
    lm = tiny.lm()
    plain = nll(lm, request().facts)
    with editors.fit(lm, request(), settings("memit", text, f"subject_token={token}")).applied(lm):
        assert nll(lm, request().facts) < plain


UNKNOWN = ("The colour of the hat is", "Nobody can say what it is", "The weight of the moon is")


@cache
def taught(kind: str, chat: bool) -> Any:
    """A model that knows the facts, and how to refuse."""
    return tiny.taught_lm([(p, a) for p, _, a in TAUGHT] + [(p, REFUSAL) for p in UNKNOWN], kind, chat=chat)


def answers_of(lm: Any, facts: Sequence[Fact]) -> list[str]:
    return [a.strip() for a in generate(lm, [contexts.prompt_of(lm, f) for f in facts], max_new_tokens=12)]


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
@pytest.mark.parametrize(("kind", "chat"), FORGETTING)
def test_taught_facts_are_forgotten_and_others_kept(method: str, kind: str, chat: bool, text: str) -> None:
    lm = taught(kind, chat)
    asked = request((0, 1, 2), (3, 4, 5))
    if chat:
        asked = ForgetRequest(
            *(tuple(replace(f, is_question=True) for f in part) for part in (asked.facts, asked.retain))
        )
    assert answers_of(lm, asked.facts + asked.retain) == [a for _, _, a in TAUGHT]
    train = ("value.steps=20", "refine.steps=120", "refine.lr=0.2", "refine.kl=1", "refine.text_kl=0.3")
    hp = settings(method, text, *train, "context_prefixes.count=1", "moments.weight=1")
    with editors.fit(lm, asked, hp).applied(lm):
        after = answers_of(lm, asked.facts + asked.retain)
    assert after == [REFUSAL] * 3 + [a for _, _, a in TAUGHT[3:]]
    assert answers_of(lm, asked.facts) == [a for _, _, a in TAUGHT[:3]]
