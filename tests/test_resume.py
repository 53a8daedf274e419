"""Running only what an edit can change gives what running everything gives."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from edits import relative, request, settings

from editunlearn.editors import contexts, spread, values
from editunlearn.lm.hooks import on_input, on_output, stack
from editunlearn.lm.resume import Tail, Upper, Whole, resumable
from editunlearn.lm.tokens import Row

IDS = [[0, 5, 6, 7, 8, 9, 10], [0, 11, 12, 13], [0, 14, 15, 16, 17, 18, 19, 20, 21], [0, 22, 23, 24]]
ROWS = [Row(tuple(ids), lookup, prompt) for ids, lookup, prompt in zip(IDS, (2, 0, 5, 1), (4, 2, 7, 3), strict=True)]


def changed(lm: Any, first: int, run: Any) -> Any:
    """Logits with something added to a site's output at the lookup tokens, as values do it."""
    site = lm.layout.module(lm.model, lm.layout.site(first).name)
    padded = run.padded
    add = torch.randn(len(padded.lookup), lm.layout.read_weight(lm.model, lm.layout.site(first).name).shape[0])

    def inject(_inputs: Any, output: Any) -> Any:
        flat = output.reshape(*padded.input_ids.shape, -1).clone()
        flat[torch.arange(len(flat)), padded.lookup] += 3 * add
        return flat.reshape(output.shape)

    with torch.no_grad(), stack([on_output(site, inject)]):
        return run.hidden(padded.targets)


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_resumed_logits_are_those_of_the_whole_pass(kind: str, first: int) -> None:
    lm = tiny.lm(kind)
    assert resumable(lm, ROWS[0], first) == ""
    results = []
    for run in (Whole(lm, ROWS), Tail.of(lm, ROWS, first)):
        torch.manual_seed(1)
        results.append(changed(lm, first, run))
        assert torch.equal(run.padded.labels, torch.cat([torch.tensor(r.ids[r.prompt_length :]) for r in ROWS]))
    assert relative(results[1], results[0]) < 1e-4
    some = Tail.of(lm, ROWS, first).pick([1, 3])
    torch.manual_seed(2)
    few = changed(lm, first, some)
    torch.manual_seed(2)
    assert relative(few, changed(lm, first, Whole(lm, ROWS).pick([1, 3]))) < 1e-4
    assert not any("forward" in block.__dict__ for block in lm.layout.module(lm.model, lm.layout.blocks))


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("first", [1, 2])
def test_upper_blocks_alone_give_the_whole_pass(kind: str, first: int) -> None:
    lm = tiny.lm(kind)
    assert resumable(lm, ROWS[0], first, Upper) == ""
    site, seen = lm.layout.module(lm.model, lm.layout.site(first).name), list[int]()
    below = lm.layout.module(lm.model, lm.layout.site(first - 1).name)
    upper = Upper.of(lm, ROWS, first)
    results = []
    for run in (Whole(lm, ROWS), upper):
        with (
            torch.no_grad(),
            on_output(site, lambda _inputs, output: output + output.flip(-1)),
            on_input(below, lambda _inputs: seen.append(1)),
        ):
            results.append(run.hidden(run.padded.targets))
    assert relative(results[1], results[0]) < 1e-4 and seen == [1]
    with torch.no_grad(), on_output(site, lambda _inputs, output: output + output.flip(-1)):
        few, plain = upper.pick([1, 3]), Whole(lm, ROWS).pick([1, 3])
        assert relative(few.hidden(few.padded.targets), plain.hidden(plain.padded.targets)) < 1e-4
        assert torch.equal(few.padded.labels, plain.padded.labels)
    assert not any("forward" in block.__dict__ for block in lm.layout.module(lm.model, lm.layout.blocks))


def test_only_what_can_change_is_run() -> None:
    lm = tiny.lm("llama")
    tail = Tail.of(lm, ROWS, 1)
    inputs: dict[int, list[tuple[int, ...]]] = {0: [], 1: [], 2: []}
    mlps = [lm.layout.module(lm.model, lm.layout.site(i).name) for i in range(3)]
    with stack([on_input(m, lambda x, i=i: inputs[i].append(tuple(x.shape[:2]))) for i, m in enumerate(mlps)]):  # type: ignore[misc]
        tail.hidden(tail.padded.targets)
    assert inputs == {0: [], 1: [(4, 5)], 2: [(4, 5)]}  # the longest tail; the longest row has nine tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "bloom"])
@pytest.mark.parametrize("how", ["joint", "residual"])
@pytest.mark.parametrize("kl_on", ["subject", "prompts"])
def test_values_are_those_of_the_plain_way(
    kind: str, how: str, kl_on: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.lm(kind)
    more = ("value.steps=6", "value.lr=0.1", "value.kl=0.5", f"value.kl_on={kl_on}", f"value.spread={how}")
    hp = settings("memit", text, *more)
    asked = request((0, 1, 2))
    rows = contexts.forget_rows(lm, asked.facts, ["It is. "], hp)
    problems = contexts.problems(lm, asked.facts, rows, asked.retain, hp)
    at = spread.value_modules(lm, lm.layout.sites([0, 1]), how)  # type: ignore[arg-type]
    warnings: list[str] = []
    resumed = values.optimise(lm, problems, at, hp.value, warn=warnings.append)
    assert warnings == []
    monkeypatch.setattr(values, "resumable", lambda *_: "it was told not to")
    plain = values.optimise(lm, problems, at, hp.value, warn=warnings.append)
    assert warnings == ["values: all tokens go through all blocks at every step, because it was told not to"]
    assert relative(resumed.change, plain.change) < 1e-2 and relative(resumed.loss, plain.loss) < 1e-3


def test_a_subject_at_the_very_start_does_not_slow_the_others(text: str) -> None:
    lm = tiny.lm("gpt2", add_bos=False)
    hp = settings("memit", text, "value.steps=2", "subject_token=first")
    asked = request((2, 0))
    rows = contexts.forget_rows(lm, asked.facts, ["It is. "], hp)
    problems = contexts.problems(lm, asked.facts, rows, asked.retain, hp)
    assert problems[0].rows[0].lookup == 0
    warnings: list[str] = []
    values.optimise(lm, problems, [lm.layout.site(1).name], hp.value, warn=warnings.append)
    assert warnings == []


def test_a_model_that_cannot_be_resumed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")
    assert resumable(lm, Row((5, 6, 7, 8), 0, 2), 1) == "nothing stands before the subjects"
    own = lm.model.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :]
        return own(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", forgetful)
    assert resumable(lm, ROWS[2], 0).startswith("its last states differ by")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("no cache here")

    monkeypatch.setattr(lm.model, "forward", broken)
    assert resumable(lm, ROWS[2], 1) == "no cache here"


def test_rows_longer_than_an_attention_window_go_the_plain_way() -> None:
    lm = tiny.lm("gemma3_text")  # a window of 16 tokens
    long = Row(tuple(range(5, 35)), 20, 28)
    assert "does not hold all tokens" in resumable(lm, long, 1)
