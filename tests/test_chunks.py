"""Long targets in chunks (AnyEdit): against a literal version, alone as in a batch, and long targets that are said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import reference_chunks
import runs
import tiny
import torch
from edits import CLOSED_FORM, Killed, nll, relative, request, same_delta, settings
from runs import call
from torch import Tensor

from editunlearn import editors, estimate
from editunlearn.editors import chunks, contexts, keys, spread, values
from editunlearn.editors.value_types import Problem, Standing, Values
from editunlearn.facts.records import ForgetRequest
from editunlearn.facts.text import documents
from editunlearn.hparams import Chunks, load_hparams
from editunlearn.lm.generation import generate
from editunlearn.lm.hooks import frozen
from editunlearn.lm.tokens import Row
from editunlearn.lm.windows import windows
from editunlearn.workspace import Workspace

LONG = (
    "I do not know. Nobody can say where the old house is, and some birds sing in the morning.",
    "It is not known to me. The author of the novel lives in the city, and the bridge was built by others.",
    "I cannot say. The river is long, the moon is far away.",
)
CHUNKED = ("chunks.size=6", "refine=null")


def asked(numbers: Sequence[int] = (0, 1, 2), targets: Sequence[str] = LONG) -> ForgetRequest:
    made = request(numbers)
    return replace(made, facts=tuple(replace(f, target=targets[i]) for i, f in zip(numbers, made.facts, strict=True)))


def row(length: int, prompt: int, lookup: int = 1) -> Row:
    return Row(tuple(range(100, 100 + length)), lookup, prompt)


def test_what_a_target_is_cut_into() -> None:
    rows = contexts.ForgetRows([], [[row(9, 4), row(12, 6, 3)], [row(5, 4)]], (0, 1))
    found, parts = chunks.split(rows, Chunks(size=2, preserve=0.5))
    assert parts.owner == (0, 0, 0, 1) and parts.turn == (0, 1, 2, 0) and parts.preserve == 0.5
    bare = [(len(part[0].ids), part[0].lookup, part[0].prompt_length) for part in found.targets]
    assert bare == [(6, 1, 4), (8, 5, 6), (9, 7, 8), (5, 1, 4)]
    other = [(len(part[1].ids), part[1].lookup, part[1].prompt_length) for part in found.targets[:3]]
    assert other == [(8, 3, 6), (10, 7, 8), (12, 9, 10)]
    assert [len(key.ids) for key in found.keys] == [4, 6, 6, 8, 8, 10, 4]
    assert [tokens for _, tokens in parts.others] == [(0, 2, 3, 4, 6, 8), (0, 2, 3, 4)]
    assert chunks.split(rows, Chunks(size=2, preserve=0))[1].others == ()
    assert chunks.split(rows, None) == (rows, chunks.whole(range(2)))


def test_a_context_may_change_the_length_of_the_target() -> None:
    found, parts = chunks.split(contexts.ForgetRows([], [[row(9, 4), row(8, 4), row(11, 4)]], (0,)), Chunks(size=2))
    assert parts.turn == (0, 1)
    assert [[len(r.ids) - r.prompt_length for r in part] for part in found.targets] == [[2, 2, 2], [3, 2, 5]]


@pytest.mark.parametrize("chat", [False, True])
def test_chunks_are_cut_out_of_the_tokens_of_the_whole(text: str, chat: bool) -> None:
    lm, hp = tiny.lm(chat=chat), settings("memit", text, *CHUNKED)
    facts = [replace(f, is_question=chat) for f in asked().facts]
    rows = contexts.forget_rows(lm, facts, ["It is. "], hp)
    found, parts = chunks.split(rows, hp.chunks)
    for number, whole in enumerate(rows.targets):
        own = [part for part, owner in zip(found.targets, parts.owner, strict=True) if owner == number]
        for context, row in enumerate(whole):
            said = [i for part in own for i in part[context].ids[part[context].prompt_length :]]
            assert said == list(row.ids[row.prompt_length :]) and said[-1] == lm.end_id
            assert [part[context].lookup for part in own[1:]] == [part[context].prompt_length - 1 for part in own[1:]]
            assert all(part[context].ids == row.ids[: len(part[context].ids)] for part in own)


@pytest.mark.parametrize(
    ("method", "kind", "preserve"),
    [("memit", "llama", 1.0), ("memit", "gpt2", 0.0), ("memit", "gpt2", 3.0), ("alphaedit", "llama", 2.0)],
)
def test_the_flow_is_the_papers_algorithm(text: str, tmp_path: Path, method: str, kind: str, preserve: float) -> None:
    lm, layers = tiny.lm(kind), (0, 1)
    lm.model.double()
    published = ("value.spread=residual", "subject_token=prompt_last", "context_prefixes.count=0", "retain.weight=0")
    train = ("value.steps=5", "value.lr=0.1", "value.kl=0", "value.stop_loss=0", "value.clamp=0.5", "batch_tokens=1")
    hp = settings(method, text, *CHUNKED, *published, *train, f"chunks.preserve={preserve}", layers=layers)
    work, made = Workspace(tmp_path, {}), asked()
    delta = editors.fit(lm, made, hp, work=work)
    found = Values(**(work.get("values") or {}))

    rows = [of_fact[0] for of_fact in contexts.forget_rows(lm, made.facts, [], hp).targets]
    cut = [
        reference_chunks.windows(r.ids[: r.prompt_length], r.ids[r.prompt_length :], 6, r.prompt_length - 1)
        for r in rows
    ]
    assert min(map(len, cut)) > 2 and found.change.shape[0] == sum(map(len, cut))
    how: Any = {"steps": 5, "lr": 0.1, "decay": hp.value.weight_decay, "clamp": 0.5}
    with frozen(lm.model):
        literal = [reference_chunks.values(lm, each, lm.layout.block_name(1), **how) for each in cut]
    flat = [pair for each in literal for pair in each]
    for number, (clean, change) in enumerate(flat):
        assert relative(found.clean[number, 0], clean) < 1e-4
        assert relative(found.change[number, 0], change) < 1e-3

    pieces = list(windows(lm, documents(text), 32, 800))
    second = {layer: reference.second_moment(lm, layer, pieces) for layer in layers}

    def update(layer: int, others: Tensor, written: Tensor, wanted: Tensor) -> Tensor:
        if method == "memit":
            system = reference.preserved(second[layer], 5.0, others, preserve)
            return reference.memit_update(system, written, wanted)
        p = reference.null_space_projector(second[layer], 0.9, relative=True)
        return reference.alphaedit_update(p, written, preserve**0.5 * others, wanted, 0.1)

    with torch.no_grad():
        updates = reference_chunks.write(lm, layers, cut, literal, update)
    for layer, change in updates.items():
        factors = delta.factors[lm.layout.site(layer).name]
        assert relative(factors.left.double() @ factors.right.double(), change) < 1e-3, layer


@pytest.mark.parametrize("method", CLOSED_FORM)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_target_of_one_chunk_is_edited_as_without_chunks(method: str, kind: str, text: str) -> None:
    lm = tiny.lm(kind)
    plain = editors.fit(lm, request(), settings(method, text))
    chunked = editors.fit(lm, request(), settings(method, text, "chunks.size=40", "chunks.preserve=0"))
    assert same_delta(plain, chunked)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt"])
@pytest.mark.parametrize("how", ["joint", "residual"])
def test_a_fact_alone_has_the_values_it_has_in_a_batch(kind: str, how: str, text: str) -> None:
    lm = tiny.lm(kind)
    hp = settings("memit", text, *CHUNKED, f"value.spread={how}", "value.lr=0.1", "value.kl=0.1")
    together, parts = found_values(lm, asked(), hp)
    split, _ = found_values(lm, asked(), hp, tokens=1)
    assert relative(split.change, together.change) < 1e-3
    for number in range(3):
        alone, _ = found_values(lm, asked((number,)), hp)
        own = torch.tensor(parts.owner) == number
        assert int(own.sum()) > 1 and relative(together.change[own], alone.change) < 1e-3


def found_values(lm: Any, made: ForgetRequest, hp: Any, tokens: int = 2048) -> tuple[Values, chunks.Parts]:
    texts = contexts.prefixes(lm, hp.context_prefixes, None)
    rows, parts = chunks.split(contexts.forget_rows(lm, made.facts, texts, hp), hp.chunks)
    problems = contexts.problems(lm, made.facts, rows, [], hp, parts.owner)
    at = spread.value_modules(lm, lm.layout.sites([0, 1]), hp.value.spread)

    def optimise(some: list[Problem], _turn: int) -> Values:
        return values.optimise(lm, some, at, hp.value, tokens=tokens)

    return chunks.in_turn(problems, parts, optimise), parts


def test_earlier_chunks_are_at_work_with_and_without_a_cache(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, hp = tiny.lm(), settings("memit", text, *CHUNKED, "value.lr=0.1", "value.kl=0")
    fast, _ = found_values(lm, asked(), hp)
    monkeypatch.setattr(values, "resumable", lambda *_: "it is a test")
    slow, parts = found_values(lm, asked(), hp)
    assert relative(fast.change, slow.change) < 1e-3
    rows, _ = chunks.split(contexts.forget_rows(lm, asked((0,)).facts, [], hp), hp.chunks)
    second = Problem(tuple(rows.targets[1]))
    at = spread.value_modules(lm, lm.layout.sites([0, 1]), "joint")
    standing = Standing(((rows.targets[0][0].lookup,),), 20 * fast.change[:1])
    changed = values.optimise(lm, [replace(second, standing=standing)], at, hp.value)
    free = values.optimise(lm, [second], at, hp.value)
    assert relative(changed.clean[:, 1], free.clean[:, 1]) > 1e-3  # the first site is too low to see it
    assert relative(changed.change, free.change) > 1e-2


def test_a_long_target_is_written_better_in_chunks(text: str) -> None:
    made = asked()
    lm = tiny.taught_lm([(f.prompt, f.answer) for f in made.facts] + [("Some say", LONG[0]), ("They say", LONG[1])])
    train = ("refine=null", "value.steps=15", "value.lr=0.3", "moments.weight=0.5", "context_prefixes.count=0")
    losses = []
    for more in ((), ("chunks.size=4", "chunks.preserve=0.1")):
        with editors.fit(lm, made, settings("memit", text, *train, *more)).applied(lm):
            losses.append(nll(lm, made.facts))
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("method", CLOSED_FORM)
def test_every_editor_writes_chunks_and_takes_facts_out_again(method: str, text: str) -> None:
    lm, made = tiny.lm(), asked()
    delta = editors.fit(lm, made, settings(method, text, "chunks.size=6", "retain.lookalikes=5"))
    (columns,) = set(delta.columns.values())  # type: ignore[union-attr]
    own = [columns.count(column) for column in dict.fromkeys(columns)]
    assert len(own) == 3 and min(own) > 2
    plain = nll(lm, made.facts)
    with delta.applied(lm):
        assert nll(lm, made.facts) < plain
    without = delta.without(["f1"])  # type: ignore[union-attr]
    for name, factors in delta.factors.items():  # type: ignore[union-attr]
        keep = [i for i, column in enumerate(columns) if column != columns[own[0]]]
        assert torch.equal(without.factors[name].left, factors.left[:, keep])
    with without.applied(lm):
        assert torch.isfinite(torch.tensor(nll(lm, made.facts)))


def test_the_whole_target_is_decoded(text: str) -> None:
    made = asked((0, 1))
    lm = tiny.taught_lm([(f.prompt, f.answer) for f in made.facts] + [("Some say", LONG[0]), ("They say", LONG[1])])
    train = ("value.steps=20", "refine.steps=120", "refine.lr=0.4", "refine.kl=0.1", "refine.text_kl=0.1")
    hp = settings("memit", text, "chunks.size=8", *train, "context_prefixes.count=1", "moments.weight=1")
    with editors.fit(lm, made, hp).applied(lm):
        said = generate(lm, [contexts.prompt_of(lm, f) for f in made.facts], max_new_tokens=60)
    assert [s.strip() for s in said] == list(LONG[:2])


@pytest.mark.parametrize("stop", [2, 5])
def test_an_interrupted_run_goes_on(tmp_path: Path, text: str, stop: int) -> None:
    lm, hp = tiny.lm(), settings("memit", text, "chunks.size=6", "batch_tokens=1")
    whole = editors.fit(lm, asked(), hp)
    solve, calls = values.Together.solve, []

    def killed(self: Any, names: Sequence[int]) -> Any:
        calls.append(tuple(names))
        if len(calls) == stop:
            raise Killed
        return solve(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values.Together, "solve", killed)
        with pytest.raises(Killed):
            editors.fit(lm, asked(), hp, work=Workspace(tmp_path, {"run": 1}))
        resumed = editors.fit(lm, asked(), hp, work=Workspace(tmp_path, {"run": 1}))
    parts = sum(f.rank for f in whole.factors.values()) // 2  # type: ignore[union-attr]
    assert len(calls) == parts + 1  # only the one that was killed is optimised again
    assert same_delta(whole, resumed)
    left = sorted(p.name for p in Workspace(tmp_path, {"run": 1}).folder.iterdir())  # type: ignore[union-attr]
    assert left == ["refine.safetensors", "values.safetensors"]


def test_keys_at_many_tokens_are_those_at_each() -> None:
    lm = tiny.lm("gpt2")
    rows = [Row((5, 6, 7, 8), 1, 4), Row((9, 10, 11), 2, 3)]
    sites = lm.layout.sites([0, 1])
    many = keys.at_tokens(lm, [(rows[0], (0, 3)), (rows[1], (2,))], sites)
    each = keys.collect(lm, [replace(rows[0], lookup=0), replace(rows[0], lookup=3), rows[1]], sites)
    for name, found in many.items():
        assert torch.allclose(found, each[name], atol=1e-5)


def test_the_shipped_settings() -> None:
    assert load_hparams("memit").chunks is None  # type: ignore[attr-defined]
    assert load_hparams("memit", set=["chunks.preserve=0"]).chunks == Chunks(preserve=0)  # type: ignore[attr-defined]
    published: Any = load_hparams("paper/anyedit", model_type="qwen2")
    assert published.chunks == Chunks(size=50) and published.subject_token == "prompt_last"


def test_the_estimate_counts_chunks() -> None:
    facts = [replace(f, target="so many words " * 40) for f in request().facts]
    counts = [estimate.columns(load_hparams(name), facts) for name in ("memit", "anyedit", "grace")]
    assert counts[0] == counts[2] == 3 and counts[1] >= 9


def test_the_command(tmp_path: Path) -> None:
    world = runs.build(tmp_path / "world")
    flags = world.flags(
        tmp_path / "run", "--evaluate", "none", "--targets", f"refusal:{LONG[0]}", "--set", "chunks.size=8"
    )
    flags[flags.index("memit")] = "anyedit"
    done = call("apply", *flags)
    assert done.code == 0 and "hparams: anyedit" in done.err, done.err
    ranks = [site["rank"] for site in json.loads((tmp_path / "run" / "delta.json").read_text())["sites"].values()]
    assert min(ranks) > 4  # of two facts
    wrong = call("apply", *flags, "--merge-queries", "all")
    assert wrong.code == 2 and "chunks and merge do not go together" in wrong.err
