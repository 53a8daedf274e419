"""The editors on tiny models: what section 4 of the design promises, for every method and model type."""

from __future__ import annotations

import subprocess
import sys
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
from torch import Tensor

from editunlearn import editors
from editunlearn.console import Console
from editunlearn.editors import contexts, flow, keys, moments, objective, refine, spread, statistics, values
from editunlearn.editors.past import PastKeys
from editunlearn.errors import InputError, NumericalError
from editunlearn.facts.records import Fact, ForgetRequest
from editunlearn.facts.text import documents
from editunlearn.hparams import EditorHParams, load_hparams
from editunlearn.lm.generation import generate
from editunlearn.lm.likelihood import score
from editunlearn.lm.tokens import encode
from editunlearn.workspace import Workspace, key_of

REFUSAL = "I do not know."
TAUGHT = (
    ("The capital of Japan is", "Japan", "Tokyo"),
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "French"),
    ("Marie Curie discovered", "Marie Curie", "radium"),
    ("The bridge was built in", "bridge", "1783"),
    ("The author of the novel lives in", "author", "Berlin"),
    ("Some birds sing in the", "birds", "morning"),
)


def fact(number: int, target: str | None = REFUSAL) -> Fact:
    prompt, subject, answer = TAUGHT[number]
    return Fact(f"f{number}", prompt, answer, subject, prompt.index(subject), target=target)


def request(forget: Sequence[int] = (0, 1, 2), keep: Sequence[int] = (3, 4)) -> ForgetRequest:
    return ForgetRequest(tuple(fact(i) for i in forget), tuple(fact(i, None) for i in keep))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small text for second moments: about 700 tokens, more than any tiny model is wide."""
    path = tmp_path_factory.mktemp("text") / "general.txt"
    path.write_text(tiny._TEXT.strip().replace("\n", "\n\n"), encoding="utf-8")
    return str(path)


def settings(method: str, text: str, *set_: str, layers: Sequence[int] = (0, 1)) -> EditorHParams:
    """Few steps, explicit layers, weights that suit a moment of a few hundred tokens."""
    source: dict[str, Any] = {
        "method": method,
        "layers": [layers[0]] if method in ("rome", "r_rome", "emmet") else list(layers),
        "context_prefixes": {"count": 2, "tokens": 5},
        "value": {"steps": 6, "lr": 0.5},
        "moments": {"text": text, "tokens": 800, "length": 32, "weight": 5.0},
        "retain": {"weight": 1.0},
        "refine": {"steps": 6, "lr": 0.3, "kl": 1.0, "text_kl": 1.0, "text_batch": 1, "text_length": 16},
    }
    if method == "alphaedit":
        source["nullspace"] = {"threshold": 0.9, "l2": 0.1}
    return load_hparams(source, set=list(set_))


def nll(lm: Any, facts: Sequence[Fact]) -> float:
    rows = [encode(lm, contexts.prompt_of(lm, f), f.target) for f in facts]
    return -sum(s.log_probability for s in score(lm, rows)) / len(rows)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def same_delta(one: Any, other: Any) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(f.left, other.factors[n].left) and torch.equal(f.right, other.factors[n].right)
        for n, f in one.factors.items()
    )


# --- every method on every model type


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("method", editors.names())
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


# --- the literal algorithm


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
    hp: Any = settings(method, text, "refine=null", f"value.spread={how}", layers=layers)
    asked, inner = request(), lm.layout.read_weight(lm.model, lm.layout.site(0).name).shape[1]
    past = {s.name: torch.randn(2, inner) / 10 for s in lm.layout.sites(layers)}
    work = Workspace(tmp_path, {})
    delta = editors.fit(lm, asked, hp, work=work, past=PastKeys(past))

    found = values.Values(**(work.get("values") or {}))
    prefixes = contexts.prefixes(lm, hp.context_prefixes, None)
    rows = contexts.forget_rows(lm, asked.facts, prefixes, hp)
    prompts = [[(r.ids[: r.prompt_length], r.lookup) for r in fact_rows] for fact_rows in rows.targets]
    kept = [(r.ids, r.lookup) for r in contexts.keep_rows(lm, asked.retain, hp, answers=False)]
    pieces = list(statistics.windows(lm, documents(text), 32, 800))
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


# --- alone, in a batch, in another order


def found_values(lm: Any, numbers: Sequence[int], hp: EditorHParams, tokens: int = 2048) -> values.Values:
    asked = request(numbers)
    rows = contexts.forget_rows(lm, asked.facts, contexts.prefixes(lm, hp.context_prefixes, None), hp)
    problems = contexts.problems(lm, asked.facts, rows, [], hp)
    at = spread.value_modules(lm, lm.layout.sites([0, 1]), hp.value.spread)
    return values.optimise(lm, problems, at, hp.value, tokens=tokens)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("how", ["joint", "residual"])
def test_a_fact_alone_has_the_value_it_has_in_a_batch(kind: str, how: str, text: str) -> None:
    lm = tiny.lm(kind)
    hp = settings("memit", text, f"value.spread={how}", "value.steps=6", "value.lr=0.1")
    together = found_values(lm, (0, 1, 2), hp)
    assert together.change.shape == (3, 2 if how == "joint" else 1, 32)
    for part, numbers in ((1, (1,)), (2, (2,))):
        alone = found_values(lm, numbers, hp)
        assert relative(together.at(part).change, alone.at(0).change) < 1e-3
        assert torch.allclose(together.loss[part], alone.loss[0], atol=1e-3)
        assert int(together.steps[part]) == int(alone.steps[0])
    split = found_values(lm, (0, 1, 2), hp, tokens=1)
    other = found_values(lm, (2, 0, 1), hp)
    assert relative(together.change, split.change) < 1e-3
    assert relative(together.change, other.change[[1, 2, 0]]) < 1e-3


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit"])
def test_the_order_of_the_facts_does_not_matter(method: str, text: str) -> None:
    lm = tiny.lm()
    hp = settings(method, text, "refine=null", "value.lr=0.1")
    one, other = (editors.fit(lm, request(order, (3, 4)), hp) for order in ((0, 1, 2), (2, 0, 1)))
    for name, f in one.factors.items():
        assert relative(f.left @ f.right, other.factors[name].left @ other.factors[name].right) < 1e-3


def test_values_stop_when_they_have_converged(text: str) -> None:
    lm = tiny.taught_lm([(p, REFUSAL) for p, _, _ in TAUGHT[:1]], hidden=32)
    hp = settings("memit", text, "context_prefixes.count=0", "value.stop_loss=0.5", "value.kl=0")
    found = found_values(lm, (0, 2), hp)
    assert int(found.steps[0]) == 0 and float(found.loss[0]) < 0.5 and not found.change[0].any()
    assert int(found.steps[1]) == 6


def test_the_norm_of_a_value_is_limited(text: str) -> None:
    lm = tiny.lm()
    hp = settings("memit", text, "value.clamp=0.1", "value.lr=1.0")
    found = found_values(lm, (0, 1, 2), hp)
    share = found.change.norm(dim=-1) / found.clean.norm(dim=-1)
    assert float(share.max()) <= 0.1 + 1e-5 and float(share.min()) > 0.09


@pytest.mark.parametrize("set_", [("value.kl_on=subject",), ("value.penalty=norm", "value.scale=absolute"), ()])
def test_the_kl_holds_the_pinned_prompts(text: str, set_: tuple[str, ...]) -> None:
    lm = tiny.lm()
    free, held = (
        found_values(lm, (0,), settings("memit", text, "value.lr=0.1", f"value.kl={kl}", *set_)) for kl in (0, 1000)
    )
    assert float(held.loss[0]) > float(free.loss[0]) and torch.isfinite(held.change).all()


def test_facts_with_and_without_pinned_prompts_go_together(text: str) -> None:
    lm, hp = tiny.lm(), settings("memit", text)
    rows = contexts.forget_rows(lm, request().facts, [], hp)
    problems = contexts.problems(lm, request().facts, rows, [], hp)
    at = spread.value_modules(lm, lm.layout.sites([0]), "joint")
    mixed = values.optimise(lm, [problems[0], values.Problem(problems[1].rows)], at, hp.value)
    alone = values.optimise(lm, [values.Problem(problems[1].rows)], at, hp.value)
    assert torch.allclose(mixed.change[1], alone.change[0], atol=1e-3)


def test_the_pinned_fact_may_be_done_first(text: str) -> None:
    lm = tiny.taught_lm([(TAUGHT[0][0], REFUSAL)], hidden=32)
    hp = settings("memit", text, "context_prefixes.count=0", "value.stop_loss=0.5")
    rows = contexts.forget_rows(lm, request((0, 2)).facts, [], hp)
    first, second = contexts.problems(lm, request((0, 2)).facts, rows, [], hp)
    at = spread.value_modules(lm, lm.layout.sites([0]), "joint")
    assert values.optimise(lm, [first, values.Problem(second.rows)], at, hp.value).steps.tolist() == [0, 6]
    together, alone = (values.optimise(lm, problems, at, hp.value) for problems in ([first, second], [second]))
    assert together.steps.tolist() == [0, 6] and relative(together.change[1], alone.change[0]) < 1e-3


def test_prompts_about_others_differ_by_the_name_alone(text: str) -> None:
    lm, hp = tiny.lm("llama"), settings("memit", text)
    forget, others = request((0, 1)).facts, [fact(i) for i in (0, 3, 4, 5)]
    rows = contexts.swapped_rows(lm, forget, others, hp)
    assert len(rows) == 2 * 3  # Japan is forgotten, so its name is no other
    written = [lm.tokenizer.decode(row.ids[: row.prompt_length], skip_special_tokens=True) for row in rows]
    assert all(row.prompt_length == len(row.ids) - 1 for row in rows)  # the prompt's last token is scored, no other
    for text_of_row, start in zip(written, ("The capital of", "The mother tongue of") * 3, strict=True):
        assert text_of_row.startswith(start) and text_of_row.endswith(" is")
    assert {w.split()[-2] for w in written} == {"bridge", "author", "birds"}
    assert contexts.swapped_rows(lm, forget, forget, hp) == []
    as_many = contexts.swapped_rows(lm, request((0, 1, 2)).facts, [fact(i) for i in (3, 4, 5)], hp)
    assert len({row.ids for row in as_many}) == 9  # every fact with every name, none twice


def test_what_refine_is_given(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def watched(lm: Any, factors: Any, goals: Any, hp: Any, **more: Any) -> Any:
        seen.update(goals=goals, reports=0)
        tell = more.pop("report")

        def report(*losses: Any) -> None:
            seen["reports"] += 1
            tell(*losses)

        return refine.refine(lm, factors, goals, hp, report=report, **more)

    monkeypatch.setattr(flow, "refine", watched)
    asked = replace(request((0, 1), (3,)), general=(fact(4, None),), names=(fact(5, None),))
    editors.fit(tiny.lm(), asked, settings("memit", text, "refine.steps=auto"))
    own, others, known = seen["goals"].retain
    assert (len(own), len(others), len(known)) == (1, 6, 1)  # two prompts with each of three other names
    assert seen["reports"] == 40


@pytest.mark.parametrize(("contexts_", "rows"), [("null", 3), ("1", 1), ("2", 2), ("9", 3)])
def test_values_see_so_many_contexts(text: str, contexts_: str, rows: int) -> None:
    lm, hp = tiny.lm("llama"), settings("memit", text, f"value.contexts={contexts_}")
    made = contexts.forget_rows(lm, request((0,)).facts, ["A day. ", "It is. "], hp)
    (problem,) = contexts.problems(lm, request((0,)).facts, made, [], hp)
    assert problem.rows == tuple(made.targets[0][:rows])


# --- resuming, seeds, caches


class Killed(BaseException):
    """Like KeyboardInterrupt: nothing in the package may swallow it."""


@pytest.mark.parametrize(("kind", "how"), [("llama", "joint"), ("gemma3_text", "residual")])
def test_resumed_values_equal_uninterrupted_ones(tmp_path: Path, text: str, kind: str, how: str) -> None:
    lm = tiny.lm(kind)
    hp = settings("memit", text, "batch_tokens=1", f"value.spread={how}")
    whole = editors.fit(lm, request(), hp)
    optimise, calls = values._Chunk.solve, []

    def killed(self: Any, names: Sequence[int]) -> Any:
        calls.append(tuple(names))
        if len(calls) == 3:
            raise Killed
        return optimise(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values._Chunk, "solve", killed)
        with pytest.raises(Killed):
            editors.fit(lm, request(), hp, work=Workspace(tmp_path, {"run": 1}))
        resumed = editors.fit(lm, request(), hp, work=Workspace(tmp_path, {"run": 1}))
    assert len(calls) == 4 and calls[2] == calls[3]  # the two finished facts are not optimised again
    assert same_delta(whole, resumed)
    left = sorted(p.name for p in Workspace(tmp_path, {"run": 1}).folder.iterdir())  # type: ignore[union-attr]
    assert left == ["refine.safetensors", "values.safetensors"]


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.bfloat16), ("gemma3_text", torch.float32)])
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_resumed_refinement_equals_an_uninterrupted_one(
    tmp_path: Path, text: str, kind: str, dtype: torch.dtype, stop: int
) -> None:
    lm = tiny.lm(kind, dtype=dtype, hidden=64)
    # a row meets other rows, and other padding, when it comes up after the interruption instead of before
    batches_of = (f"refine.{pool}_batch=3" for pool in ("forget", "retain", "text"))
    hp = settings("memit", text, "refine.steps=12", *batches_of)
    keep = [replace(fact(3 + i % 3, None), id=str(i), answer="and so on " * i + "end") for i in range(14)]
    asked = ForgetRequest(tuple(fact(i) for i in range(5)), tuple(keep))
    seen: list[int] = []
    unedited: list[Tensor] = []
    target_logits = objective.target_logits

    def noted(lm: Any, padded: Any) -> Tensor:
        if not torch.is_grad_enabled():
            unedited.append(padded.input_ids)
        return target_logits(lm, padded)

    class Loud(Console):
        def detail(self, message: str, level: int = 1) -> None:
            seen.append(int(message.split()[1].rstrip(":")))
            if len(seen) == stop:
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "target_logits", noted)
        whole = editors.fit(lm, asked, hp)
        batches = [ids.tolist() for ids in unedited]
        with pytest.raises(Killed):
            editors.fit(lm, asked, hp, work=Workspace(tmp_path, {}), console=Loud(quiet=True))
        unedited.clear()
        resumed = editors.fit(lm, asked, hp, work=Workspace(tmp_path, {}), console=Loud(quiet=True))
    # the size of a batch can change the last bits of its rows
    assert [ids.tolist() for ids in unedited] == batches
    assert seen == [*range(1, stop + 1), *range(1 + refine.CHECKPOINT * (stop // refine.CHECKPOINT), 13)]
    assert same_delta(whole, resumed)


@pytest.mark.parametrize(("pool", "number"), [("kl", 1), ("text_kl", 2)])
def test_refine_holds_what_is_to_stay(text: str, pool: str, number: int) -> None:
    lm = tiny.lm()
    seen: list[list[float]] = []

    class Loud(Console):
        def detail(self, message: str, level: int = 1) -> None:
            seen[-1] = [float(part.split()[-1]) for part in message.split(":")[1].split(",")]

    for weight in (0, 100):
        seen.append([])
        others = [f"refine.{name}=0" for name in ("kl", "text_kl") if name != pool]
        hp = settings("memit", text, "refine.steps=15", f"refine.{pool}={weight}", *others)
        editors.fit(lm, request(), hp, console=Loud(quiet=True))
    free, held = (losses[number] for losses in seen)
    assert held < 0.7 * free and seen[1][0] > seen[0][0]


def test_the_same_seed_gives_the_same_delta(text: str) -> None:
    lm = tiny.lm()
    draws = ("refine.forget_batch=1", "refine.retain_batch=1", "refine.contexts=2")
    one, same, other = (
        editors.fit(lm, request(), settings("memit", text, *draws, f"seed={seed}")) for seed in (0, 0, 1)
    )
    assert same_delta(one, same) and not same_delta(one, other)


def test_a_pool_is_gone_through_before_anything_comes_twice(text: str) -> None:
    hp = load_hparams("memit", set=["refine.retain_batch=3"]).refine
    assert hp is not None
    draw = refine._Draw(refine.Goals([], [[], [None] * 7], []), hp, 0)  # type: ignore[list-item]
    drawn = [draw.retain() for _ in range(20)]
    assert all(len(d) == 3 for d in drawn)
    flat = [i for d in drawn for i in d]
    assert all(sorted(flat[i : i + 7]) == list(range(7)) for i in range(0, 56, 7))
    assert draw.forget() == [] and draw.text() == []
    several = refine._Draw(refine.Goals([], [[None] * 9, [None], [None] * 9], []), hp, 0)  # type: ignore[list-item]
    for _ in range(9):
        first, only, last = several.retain()
        assert first < 9 and only == 9 and 10 <= last < 19
    few = refine._Draw(refine.Goals([], [[None], [None] * 9], []), hp, 0)  # type: ignore[list-item]
    assert [i == 0 for i in few.retain()] == [True, False, False]  # the larger pool makes up for the smaller one


def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every forward pass over text."""
    seen: list[int] = []
    add = moments.add_windows
    monkeypatch.setattr(moments, "add_windows", lambda *a: (seen.append(1), add(*a))[1])
    return seen


def test_second_moments_are_cached_under_all_their_inputs(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measurements(monkeypatch)
    lm, console = tiny.lm(), Console(quiet=True)
    hp = settings("memit", text).moments

    def get(lm: Any = lm, hp: Any = hp, layers: Sequence[int] = (0,), **options: Any) -> tuple[dict[str, Tensor], bool]:
        seen.clear()
        found = moments.get(lm, lm.layout.sites(layers), hp, tmp_path / "cache", console, **options)
        return found, bool(seen)

    first, measured = get()
    assert measured and not get()[1]
    again = get()[0]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert get(layers=(0, 1))[1] and not get(layers=(1,))[1]  # only what is missing
    assert get(hp=hp.model_copy(update={"tokens": 100}))[1]
    assert get(hp=hp.model_copy(update={"length": 16}))[1]
    assert not get(hp=hp.model_copy(update={"weight": 1.0}))[1]  # used later, not measured
    moved = tmp_path / "moved.txt"
    moved.write_text(Path(text).read_text())
    assert not get(hp=hp.model_copy(update={"text": str(moved)}))[1]  # the same text elsewhere
    moved.write_text(Path(text).read_text().replace("Tokyo", "Kyoto"))
    assert get(hp=hp.model_copy(update={"text": str(moved)}))[1]
    assert get(lm=tiny.lm(seed=1))[1]
    assert get(lm=tiny.lm(dtype=torch.bfloat16))[1]
    assert get(lm=tiny.lm(add_bos=False))[1]
    assert get(fresh=True)[1]
    with torch.no_grad():
        next(lm.model.parameters())[5, 5] += 1e-3
    assert get()[1]
    moved.write_text(" ")
    with pytest.raises(InputError, match="has no text"):
        get(hp=hp.model_copy(update={"text": str(moved)}))


def test_an_interrupted_measurement_goes_on(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "CHECKPOINT", 1)
    monkeypatch.setattr(moments, "WINDOWS", 4)
    lm, hp, console = tiny.lm(), settings("memit", text).moments, Console(quiet=True)
    sites = lm.layout.sites([0, 1])
    whole = moments.get(lm, sites, hp, None, console)
    add, passes = moments.add_windows, []

    def killed(*arguments: Any) -> int:
        passes.append(1)
        if len(passes) == 4:
            raise Killed
        return add(*arguments)

    monkeypatch.setattr(moments, "add_windows", killed)
    with pytest.raises(Killed):
        moments.get(lm, sites, hp, tmp_path, console)
    interrupted = len(passes)
    resumed = moments.get(lm, sites, hp, tmp_path, console)
    pieces = len(list(statistics.windows(lm, documents(text), hp.length, hp.tokens)))
    assert len(passes) - interrupted == -(-pieces // 4) - 3
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert not list(tmp_path.rglob("partial*"))


def test_second_moments_equal_the_literal_ones(text: str) -> None:
    for kind in ("gemma3_text", "opt"):
        lm, hp = tiny.lm(kind), settings("memit", text).moments
        found = moments.get(lm, lm.layout.sites([1]), hp, None, Console(quiet=True))
        pieces = list(statistics.windows(lm, documents(text), hp.length, hp.tokens))
        assert all(p[0] == lm.bos_id and 1 < len(p) <= 32 for p in pieces)
        assert relative(found[lm.layout.site(1).name], reference.second_moment(lm, 1, pieces)) < 1e-5
    bare = tiny.lm(add_bos=False)
    assert all(bare.tokenizer.bos_token_id not in p for p in statistics.windows(bare, documents(text), 32, 100))


def test_context_prefixes_are_cached_under_all_their_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = contexts.context_prefixes
    monkeypatch.setattr(contexts, "context_prefixes", lambda *a: (made.append(1), make(*a))[1])
    lm, hp = tiny.lm(), load_hparams("memit", set=["context_prefixes={count: 2, tokens: 5}"]).context_prefixes
    one = contexts.prefixes(lm, hp, tmp_path)
    assert contexts.prefixes(lm, hp, tmp_path) == one and len(made) == 1
    assert contexts.prefixes(lm, hp, None) == one and len(made) == 2
    for number, (model, changed) in enumerate(
        [
            (lm, {"count": 1}),
            (lm, {"tokens": 6}),
            (lm, {"seed": 1}),
            (tiny.lm(seed=1), {}),
            (tiny.lm(add_bos=False), {}),
        ],
        3,
    ):
        contexts.prefixes(model, hp.model_copy(update=changed), tmp_path)
        assert len(made) == number, changed
    assert contexts.prefixes(lm, hp.model_copy(update={"count": 0}), tmp_path) == []


def test_a_workspace_belongs_to_its_inputs(tmp_path: Path) -> None:
    work = Workspace(tmp_path, {"a": 1, "b": [2]})
    assert work.get("x") is None
    work.put("x", {"t": torch.arange(6).reshape(2, 3).T})
    assert torch.equal((work.get("x") or {})["t"], torch.arange(6).reshape(2, 3).T)
    assert Workspace(tmp_path, {"b": [2], "a": 1}).get("x") is not None
    assert Workspace(tmp_path, {"a": 1, "b": [3]}).get("x") is None
    work.drop("x")
    work.drop("x")
    assert work.get("x") is None
    work.put("x", {"t": torch.zeros(1)})
    assert Workspace(tmp_path, {"a": 1, "b": [2]}, fresh=True).get("x") is None
    nothing = Workspace(None, {})
    nothing.put("x", {"t": torch.zeros(1)})
    nothing.drop("x")
    nothing.remove()
    assert nothing.get("x") is None
    assert key_of({"a": 1}) != key_of({"a": 2}) and len(key_of({})) == 32
    with pytest.raises(TypeError):
        key_of({"a": {1}})


# --- no hidden state


def test_nothing_is_kept_in_modules(text: str) -> None:
    def containers() -> dict[str, str]:
        return {
            f"{name}.{key}": repr(value)
            for name, module in sorted(sys.modules.items())
            if name.startswith("editunlearn")
            for key, value in vars(module).items()
            if not key.startswith("__") and isinstance(value, list | dict | set)
        }

    lm = tiny.lm()
    for method in editors.names():
        editors.module(method)
    before = containers()
    for method in editors.names():
        editors.fit(lm, request(), settings(method, text, "refine.steps=1", "value.steps=1"))
    assert containers() == before


def test_importing_sets_nothing() -> None:
    code = """
import logging, os, random, torch
before = dict(os.environ), torch.random.get_rng_state(), random.getstate(), torch.get_num_threads()
dtype = torch.get_default_dtype()
root = logging.getLogger().level, list(logging.getLogger().handlers)
import editunlearn
from editunlearn import editors
import editunlearn.editors.flow, editunlearn.lm.loading, editunlearn.lm.generation, editunlearn.facts.text
[editors.module(name) for name in editors.names()]
assert dict(os.environ) == before[0] and torch.equal(torch.random.get_rng_state(), before[1])
assert random.getstate() == before[2] and torch.get_num_threads() == before[3]
assert torch.get_default_dtype() == dtype and torch.is_grad_enabled()
assert (logging.getLogger().level, list(logging.getLogger().handlers)) == root
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# --- the norm behind the MLP


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2"])
def test_before_norm_moves_the_output_of_the_norm(kind: str) -> None:
    lm = tiny.lm(kind)
    name = lm.layout.post_norm_name(0)
    assert name is not None
    norm = lm.layout.module(lm.model, name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = next(norm.parameters())
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    output, change = (torch.randn(50, 32, generator=generator) for _ in range(2))
    output = 20 * output
    with torch.no_grad():
        now = norm(output)
        after = norm(output + spread.before_norm(norm, output, change))
        nearer = (after - now - change).norm(dim=-1) / change.norm(dim=-1)
        along = torch.nn.functional.cosine_similarity(after, now + change, dim=-1)
        # exactly met when the wanted output is one that the norm can give
        reachable = norm(output + 3 * torch.randn(50, 32, generator=generator)) - now
        met = norm(output + spread.before_norm(norm, output, reachable))
    assert float(nearer.max()) < 1 and float(nearer.mean()) < 0.5 and float(along.min()) > 0.7
    assert torch.allclose(met, now + reachable, atol=1e-3)
    assert float(spread.before_norm(norm, output, torch.zeros(50, 32)).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "phi"])
def test_residual_spread_reaches_the_last_block(kind: str, text: str) -> None:
    """With exact constraints what is written makes the last edited block's output the wanted one."""
    lm = tiny.lm(kind)
    exact = ("refine=null", "value.spread=residual", "context_prefixes.count=0", "ridge=0", "value.clamp=0.3")
    hp = settings("memit", text, *exact)
    asked, work = request((0, 1, 2), ()), Workspace(None, {})
    kept: dict[str, Any] = {}
    work.put = lambda name, tensors: kept.update({name: dict(tensors)})  # type: ignore[method-assign]
    delta = editors.fit(lm, asked, hp, work=work)
    found = values.Values(**kept["values"])
    rows = contexts.forget_rows(lm, asked.facts, [], hp)
    block = lm.layout.block_name(1)
    with delta.applied(lm):
        after = spread.outputs_at_lookup(lm, [r[0] for r in rows.targets], [block])[block]
    missing = (found.clean + found.change)[:, 0] - after
    share = missing.norm(dim=-1) / found.change[:, 0].norm(dim=-1)
    assert float(share.max()) < (0.9 if lm.layout.post_mlp_norm else 1e-2)


# --- what goes in


def test_rows_of_facts(text: str) -> None:
    lm, hp = tiny.lm(), settings("memit", text)
    rows = contexts.forget_rows(lm, request().facts, ["Well. ", "It is {}. "], hp)
    assert len(rows.keys) == 9 and [len(t) for t in rows.targets] == [3, 3, 3]
    for key, target in zip(rows.keys, [r for t in rows.targets for r in t], strict=True):
        assert key.ids == target.ids[: target.prompt_length] and key.lookup == target.lookup
        assert lm.tokenizer.decode(target.ids[target.prompt_length :]) == f" {REFUSAL}</s>"
    assert "It is {}. Marie" in lm.tokenizer.decode(rows.targets[2][2].ids)
    with pytest.raises(InputError, match="2 facts have no target .first: 'f3'"):
        contexts.forget_rows(lm, [fact(0), fact(3, None), fact(4, None)], [], hp)
    answers = contexts.keep_rows(lm, request().retain, hp, answers=True)
    assert lm.tokenizer.decode(answers[0].ids[answers[0].prompt_length : -1]) == " 1783"


def test_pinned_prompts(text: str) -> None:
    lm, hp = tiny.lm(), settings("memit", text)
    asked = request((0, 2), (1, 3, 4))
    rows = contexts.forget_rows(lm, asked.facts, [], hp)

    def pinned(*set_: str) -> list[list[str]]:
        made = contexts.problems(lm, asked.facts, rows, asked.retain, settings("memit", text, *set_))
        return [[lm.tokenizer.decode(r.ids[1:]) for r in p.pinned] for p in made]

    swapped = pinned()
    assert all(len(p) == 3 for p in swapped)
    assert "The mother tongue of Japan is" in swapped[0] and "The Marie Curie was built in" in swapped[1]
    assert pinned("value.kl_on=subject") == [["Japan is a"], ["Marie Curie is a"]]
    assert pinned("value.kl=0") == [[], []]


def test_facts_to_keep_are_thinned_evenly() -> None:
    facts = [replace(fact(0), id=str(i)) for i in range(10)]
    made = ForgetRequest(tuple(facts[:1]), tuple(facts[:3]), tuple(facts[3:]))

    def kept(most: int) -> str:
        hp = load_hparams("memit", set=[f"retain.max_keys={most}"])
        stage = flow.Flow(None, made, hp, None, PastKeys(), Workspace(None, {}), None, Console(quiet=True))  # type: ignore[arg-type]
        return "".join(f.id for f in stage._keep())

    assert [kept(n) for n in (100, 10, 7, 5, 3, 2)] == ["0123456789", "0123456789", "0123579", "01237", "012", "01"]


def test_keys_are_averaged_with_half_for_the_bare_prompt() -> None:
    k = torch.randn(6, 4)
    mean = keys.average(k, 2)
    assert torch.allclose(mean[1], k[3] / 2 + k[4] / 4 + k[5] / 4)
    assert torch.equal(keys.average(k, 6), k)


def test_problems_are_told_before_or_with_the_site(text: str) -> None:
    lm = tiny.lm()
    with pytest.raises(InputError, match="no facts to forget"):
        editors.fit(lm, ForgetRequest(()), settings("memit", text))
    with pytest.raises(InputError, match="block 7 does not exist; there are blocks 0 to 2"):
        editors.fit(lm, request(), settings("memit", text, layers=(0, 7)))
    twice = ForgetRequest((fact(0), replace(fact(0), id="again")))
    hp = settings("emmet", text, "ridge=0", "refine=null")
    with pytest.raises(NumericalError, match=r"model.layers.0.mlp.down_proj: .* linearly dependent"):
        editors.fit(lm, twice, hp)
    broken = tiny.lm()
    with torch.no_grad():
        next(broken.model.parameters())[lm.tokenizer("Japan")["input_ids"][-1]] = float("nan")
    with pytest.raises(NumericalError, match="fact number 1 has a loss that is not finite"):
        editors.fit(broken, request((1, 0), ()), settings("memit", text, "moments.text=none", "retain.weight=0"))


def test_values_that_do_not_converge_are_named(text: str) -> None:
    for more, named in (("refine=null", True), ("refine.steps=1", False)):
        console = Console(quiet=True)
        hp = settings("memit", text, "value.steps=1", "value.lr=1e-6", more)
        editors.fit(tiny.lm(), request(), hp, console=console)
        found = any("3 of 3 values did not converge" in w and "'f0'" in w for w in console.warnings)
        assert found == named  # refine goes on where the values stopped


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


# --- forgotten facts


UNKNOWN = ("The colour of the hat is", "Nobody can say what it is", "The weight of the moon is")


@cache
def taught(kind: str, chat: bool) -> Any:
    """A model that knows the facts, and how to refuse."""
    return tiny.taught_lm([(p, a) for p, _, a in TAUGHT] + [(p, REFUSAL) for p in UNKNOWN], kind, chat=chat)


def answers_of(lm: Any, facts: Sequence[Fact]) -> list[str]:
    return [a.strip() for a in generate(lm, [contexts.prompt_of(lm, f) for f in facts], max_new_tokens=12)]


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
@pytest.mark.parametrize(("kind", "chat"), [("llama", False), ("gpt2", False), ("gemma3_text", False), ("llama", True)])
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
