"""What the stages of an edit are given and what they find: keys, values, prompts to keep."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from edits import REFUSAL, TAUGHT, fact, relative, request, settings

from editunlearn import editors
from editunlearn.console import Console
from editunlearn.editors import contexts, keeping, keys, made_up, spread, values
from editunlearn.editors.value_types import Problem, Values
from editunlearn.errors import InputError, NumericalError
from editunlearn.facts.records import ForgetRequest
from editunlearn.hparams import EditorHParams
from editunlearn.workspace import Workspace


def found_values(lm: Any, numbers: Sequence[int], hp: EditorHParams, tokens: int = 2048) -> Values:
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
    mixed = values.optimise(lm, [problems[0], Problem(problems[1].rows)], at, hp.value)
    alone = values.optimise(lm, [Problem(problems[1].rows)], at, hp.value)
    assert torch.allclose(mixed.change[1], alone.change[0], atol=1e-3)


def test_the_pinned_fact_may_be_done_first(text: str) -> None:
    lm = tiny.taught_lm([(TAUGHT[0][0], REFUSAL)], hidden=32)
    hp = settings("memit", text, "context_prefixes.count=0", "value.stop_loss=0.5")
    rows = contexts.forget_rows(lm, request((0, 2)).facts, [], hp)
    first, second = contexts.problems(lm, request((0, 2)).facts, rows, [], hp)
    at = spread.value_modules(lm, lm.layout.sites([0]), "joint")
    assert values.optimise(lm, [first, Problem(second.rows)], at, hp.value).steps.tolist() == [0, 6]
    together, alone = (values.optimise(lm, problems, at, hp.value) for problems in ([first, second], [second]))
    assert together.steps.tolist() == [0, 6] and relative(together.change[1], alone.change[0]) < 1e-3


def test_prompts_about_others_differ_by_the_name_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up, "capitalised_words", lambda _: [])
    lm, hp = tiny.lm("llama"), settings("memit", text)
    forget = request((0, 1)).facts
    subjects = contexts.other_names(lm, forget, [fact(i) for i in (0, 3, 4, 5)], hp)
    assert len(subjects) == 3  # Japan is forgotten, so its name is no other
    rows = contexts.swapped_rows(lm, forget, subjects, 100, hp)
    assert len(rows) == 2 * 3
    written = [lm.tokenizer.decode(row.ids[: row.prompt_length], skip_special_tokens=True) for row in rows]
    assert all(row.prompt_length == len(row.ids) - 1 for row in rows)  # the prompt's last token is scored, no other
    for text_of_row, start in zip(written, ("The capital of", "The mother tongue of") * 3, strict=True):
        assert text_of_row.startswith(start) and text_of_row.endswith(" is")
    assert {w.split()[-2] for w in written} == {"bridge", "author", "birds"}
    assert contexts.swapped_rows(lm, forget, [], 100, hp) == [] == contexts.swapped_rows(lm, [], subjects, 100, hp)
    assert len(contexts.swapped_rows(lm, forget, subjects, 5, hp)) == 5
    as_many = contexts.swapped_rows(lm, request((0, 1, 2)).facts, subjects, 100, hp)
    assert len({row.ids for row in as_many}) == 9  # every fact with every name, none twice


@pytest.mark.parametrize("space", ["\u2581", "\u0120", " "])
def test_names_are_made_of_the_capitalised_words_of_the_vocabulary(space: str) -> None:
    tokens = ["Luca", "luca", "LUCA", "Al", "Lu\u0107a", "Alpha1", "Bern"]
    vocabulary = {space + token: 90 - number for number, token in enumerate(tokens)} | {"Joined": 5}
    lm = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary))
    words = made_up.capitalised_words(lm)  # type: ignore[arg-type]
    assert words == ["Bern", "Luca"]  # by id
    first = [made_up.name(words, random.Random(1)) for _ in range(3)]
    assert len(set(first)) == 1  # seeded
    draw = random.Random(1)
    made = [made_up.name(words, draw).split() for _ in range(400)]
    assert {len(n) for n in made} == {1, 2, 3} and {w for n in made for w in n} == set(words)


def test_made_up_names_join_those_of_others(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, hp = tiny.lm("llama"), settings("memit", text)
    monkeypatch.setattr(made_up, "capitalised_words", lambda _: ["Japan", "Bern", "Luca"])
    subjects = contexts.other_names(lm, request((0, 1)).facts, [fact(3)], hp)
    forgotten = {f.subject for f in request((0, 1)).facts}
    assert "Japan" in forgotten and not forgotten & set(subjects)
    assert {fact(3).subject, "Bern", "Luca"} < set(subjects) and len(subjects) == len(set(subjects))
    assert not any("Japan" in name.split() for name in subjects)


@pytest.mark.parametrize(("contexts_", "rows"), [("null", 3), ("1", 1), ("2", 2), ("9", 3)])
def test_values_see_so_many_contexts(text: str, contexts_: str, rows: int) -> None:
    lm, hp = tiny.lm("llama"), settings("memit", text, f"value.contexts={contexts_}")
    made = contexts.forget_rows(lm, request((0,)).facts, ["A day. ", "It is. "], hp)
    (problem,) = contexts.problems(lm, request((0,)).facts, made, [], hp)
    assert problem.rows == tuple(made.targets[0][:rows])


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


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "phi", "qwen2_moe"])
def test_residual_spread_reaches_the_last_block(kind: str, text: str) -> None:
    """With exact constraints what is written makes the last edited block's output the wanted one."""
    lm = tiny.lm(kind)
    exact = ("refine=null", "value.spread=residual", "context_prefixes.count=0", "ridge=0", "value.clamp=0.3")
    hp = settings("memit", text, *exact)
    asked, work = request((0, 1, 2), ()), Workspace(None, {})
    kept: dict[str, Any] = {}
    work.put = lambda name, tensors: kept.update({name: dict(tensors)})  # type: ignore[method-assign]
    delta = editors.fit(lm, asked, hp, work=work)
    found = Values(**kept["values"])
    rows = contexts.forget_rows(lm, asked.facts, [], hp)
    block = lm.layout.block_name(1)
    with delta.applied(lm):
        after = spread.outputs_at_lookup(lm, [r[0] for r in rows.targets], [block])[block]
    missing = (found.clean + found.change)[:, 0] - after
    share = missing.norm(dim=-1) / found.change[:, 0].norm(dim=-1)
    assert float(share.max()) < (0.9 if lm.layout.post_mlp_norm else 1e-2)


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
    first = settings("memit", text, "value.kl_on=subject", "subject_token=first")
    (row,) = contexts.problems(lm, asked.facts, rows, asked.retain, first)[1].pinned
    assert lm.tokenizer.decode(row.ids[row.lookup :]).strip() == "Marie Curie is a"  # from the first token on


def test_facts_to_keep_are_thinned_evenly() -> None:
    facts = [replace(fact(0), id=str(i)) for i in range(10)]
    made = ForgetRequest(tuple(facts[:1]), tuple(facts[:3]), tuple(facts[3:]))

    def kept(most: int) -> str:
        return "".join(f.id for f in keeping.facts(made, most))

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
