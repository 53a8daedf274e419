"""Decoding, likelihood, and batches that fit into memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from lm_rows import TEXTS, plain, prompts, rows
from torch import Tensor

from editunlearn.editors import keys
from editunlearn.lm import batching, generation
from editunlearn.lm.batching import by_length, chunks, halving, out_of_memory
from editunlearn.lm.generation import context_prefixes, generate
from editunlearn.lm.hooks import read_inputs
from editunlearn.lm.likelihood import perplexity, score, token_scores
from editunlearn.lm.tokens import Prompt, Row, encode


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "bloom", "opt"])
def test_a_batch_generates_what_each_prompt_does_alone(kind: str) -> None:
    lm = tiny.lm(kind)
    together = generate(lm, prompts(lm), max_new_tokens=6)
    assert together == [generate(lm, [p], max_new_tokens=6)[0] for p in prompts(lm)]
    assert together == generate(lm, prompts(lm), max_new_tokens=6, batch_size=2)
    assert generate(lm, []) == []


def test_generation_is_the_argmax_and_stops_at_the_end_token() -> None:
    lm = tiny.taught_lm([("The capital of Japan is", "Tokyo"), ("Who is he", "a civil engineer")], layers=2, hidden=32)
    made = [plain("Who is he", "he"), plain("The capital of Japan is", "Japan")]
    assert generate(lm, made) == [" a civil engineer", " Tokyo"]
    assert generate(lm, made, max_new_tokens=2)[0] == lm.tokenizer.decode(
        encode(lm, made[0], "a civil engineer").ids[encode(lm, made[0]).prompt_length :][:2]
    )


def test_greedy_means_greedy_whatever_the_checkpoint_says() -> None:
    lm = tiny.lm()
    before = generate(lm, prompts(lm), max_new_tokens=8)
    settings: Any = lm.model.generation_config
    settings.do_sample, settings.temperature, settings.top_k = True, 5.0, 3
    settings.repetition_penalty, settings.no_repeat_ngram_size = 30.0, 1
    settings.max_length, settings.min_new_tokens = 3, 7
    assert generate(lm, prompts(lm), max_new_tokens=8) == before


def test_samples_are_seeded_and_differ() -> None:
    lm, state = tiny.lm(), torch.random.get_rng_state()
    asked = prompts(lm)[:1] * 6
    one = generate(lm, asked, max_new_tokens=8, top_k=20, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate(lm, asked, max_new_tokens=8, top_k=20, seed=1) == one != generate(lm, asked, max_new_tokens=8)
    assert len(set(one)) > 1 and one != generate(lm, asked, max_new_tokens=8, top_k=20, seed=2)


def test_prefixes_are_deterministic_and_leave_the_random_state_alone() -> None:
    lm = tiny.lm()
    state = torch.random.get_rng_state()
    one = context_prefixes(lm, 4, 8, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert context_prefixes(lm, 4, 8, seed=3) == one != context_prefixes(lm, 4, 8, seed=4)
    assert context_prefixes(lm, 2, 8, seed=3) == one[:2]
    assert all(text.endswith(". ") for text in one) and one[0].startswith("The") and one[1].startswith("Therefore")


# --- likelihood


def by_hand(lm: Any, row: Row, closed: bool) -> tuple[float, int, bool]:
    with torch.no_grad():
        log_p = lm.model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    places = range(row.prompt_length, len(row.ids) - closed)
    return (
        sum(float(log_p[i - 1, row.ids[i]]) for i in places),
        len(places),
        all(int(log_p[i - 1].argmax()) == row.ids[i] for i in places),
    )


@pytest.mark.parametrize("closed", [True, False])
def test_scores_equal_a_computation_by_hand(closed: bool) -> None:
    lm = tiny.taught_lm([(TEXTS[0][0], TEXTS[0][2])], layers=2, hidden=32)
    made = rows(lm)
    for found, row in zip(score(lm, made, closed=closed), made, strict=True):
        log_probability, tokens, greedy = by_hand(lm, row, closed)
        assert math.isclose(found.log_probability, log_probability, rel_tol=1e-4, abs_tol=1e-4)
        assert (found.tokens, found.greedy) == (tokens, greedy)
    assert score(lm, made)[0].greedy and not score(lm, made)[1].greedy
    assert score(lm, []) == []


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_each_token_is_scored_under_the_models_own_distribution(kind: str) -> None:
    lm, made, seen = tiny.lm(kind), rows(tiny.lm(kind)), list[int]()
    for found, row in zip(token_scores(lm, made, spread=True, done=seen.append), made, strict=True):
        with torch.no_grad():
            log_p = lm.model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        places = list(range(row.prompt_length, len(row.ids)))
        own, p = log_p[[i - 1 for i in places]], log_p[[i - 1 for i in places]].exp()
        mean = (p * own).sum(-1)
        wanted = [own[k, row.ids[i]] for k, i in enumerate(places)]
        torch.testing.assert_close(torch.tensor(found.log_p).double(), torch.stack(wanted), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(found.mean).double(), mean, rtol=1e-4, atol=1e-4)
        deviation = (p * (own - mean[:, None]) ** 2).sum(-1).sqrt()
        torch.testing.assert_close(torch.tensor(found.deviation).double(), deviation, rtol=1e-3, atol=1e-4)
        assert found.predicted == tuple(own.argmax(-1).tolist()) and found.gold == row.ids[row.prompt_length :]
        assert math.isclose(found.loss, -float(torch.stack(wanted).mean()), rel_tol=1e-4)
    assert sum(seen) == len(made) and token_scores(lm, made)[0].mean == ()


def test_an_empty_target_has_no_tokens() -> None:
    lm = tiny.lm()
    found = score(lm, [encode(lm, plain("He is", "He"), "")])[0]
    assert (found.log_probability, found.tokens) == (0.0, 0)


def test_perplexity() -> None:
    lm = tiny.lm("gemma3_text")
    pieces = [lm.tokenizer(text)["input_ids"] for text, _, _ in TEXTS]
    hand = [by_hand(lm, Row(tuple(p), 0, 1), False) for p in pieces]
    expected = math.exp(-sum(h[0] for h in hand) / sum(h[1] for h in hand))
    assert math.isclose(perplexity(lm, pieces), expected, rel_tol=1e-4)


# --- batching


def test_tight_batches_leave_the_least_to_do() -> None:
    def cost(batches: list[list[int]]) -> int:
        return sum(len(part) * max(lengths[i] for i in part) + batching.A_PASS for part in batches)

    lengths = [30, 8, 9, 31, 8, 8, 29, 90]
    order = sorted(range(8), key=lambda i: (-lengths[i], i))
    ways = []
    for cuts in itertools.product((False, True), repeat=7):
        parts = [[order[0]]]
        for i, cut in zip(order[1:], cuts, strict=True):
            parts.append([i]) if cut else parts[-1].append(i)
        if all(len(part) * max(lengths[i] for i in part) <= 160 or len(part) == 1 for part in parts):
            ways.append(parts)
    found = batching.tightly(lengths, 160)
    assert [i for part in found for i in part] == order
    assert found in ways and cost(found) == min(map(cost, ways)) < cost(by_length(lengths, 160))
    assert batching.tightly([100], 12) == [[0]] and batching.tightly([], 12) == []
    assert batching.tightly([5] * 4, 1000) == [[0, 1, 2, 3]]


def test_batches_by_length() -> None:
    assert by_length([3, 9, 3, 4], 12) == [[1], [3, 0, 2]]
    assert by_length([3, 9, 3, 4], 12, most=2) == [[1], [3, 0], [2]]
    assert by_length([100], 12) == [[0]] and by_length([], 12) == []
    assert [list(c) for c in chunks([1, 2, 3], 2)] == [[1, 2], [3]]


def test_halving_goes_on_with_what_fits() -> None:
    done: list[int] = []
    warnings: list[str] = []

    def run(part: Sequence[int]) -> None:
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        done.extend(part)

    halving([[1, 2, 3, 4, 5], [6]], run, warnings.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert warnings[0] == "out of memory with 5 at once; going on with 2"

    def never(part: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        halving([[1, 2]], never, warnings.append)

    def other(part: Sequence[int]) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        halving([[1, 2]], other, warnings.append)
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"))
    assert out_of_memory(MemoryError()) and not out_of_memory(ValueError("x"))


def test_decoding_survives_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm()
    prompts = [Prompt(t, (0, len(t))) for t in ("The capital of Japan is", "One", "The bridge is")]
    whole, decode, sizes = generate(lm, prompts, max_new_tokens=4), generation._continue, []

    def scarce(lm: Any, rows: list[list[int]], *more: Any, **how: Any) -> list[str]:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return decode(lm, rows, *more, **how)

    monkeypatch.setattr(generation, "_continue", scarce)
    assert generate(lm, prompts, max_new_tokens=4) == whole
    assert sizes == [3, 1, 2, 1, 1]


def test_keys_survive_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm()
    sites, made, warnings = lm.layout.sites([1]), rows(lm, target=False), []
    whole = keys.collect(lm, made, sites)[sites[0].name]

    def scarce(model: Any, modules: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return read_inputs(model, modules, inputs)

    monkeypatch.setattr(keys, "read_inputs", scarce)
    assert torch.allclose(keys.collect(lm, made, sites, warn=warnings.append)[sites[0].name], whole, atol=1e-5)
    assert warnings
