"""Hooks, tokens, padded batches, generation and likelihood on tiny models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from editunlearn.editors import keys
from editunlearn.errors import InputError
from editunlearn.lm import generation
from editunlearn.lm.batching import by_length, chunks, halving, out_of_memory
from editunlearn.lm.generation import context_prefixes, generate
from editunlearn.lm.hooks import (
    StopForward,
    at_scored_positions,
    contiguous_input,
    first_tensor,
    on_input,
    on_output,
    read_inputs,
    run_truncated,
)
from editunlearn.lm.likelihood import logits_of, perplexity, score, target_logits
from editunlearn.lm.tokens import Prompt, Row, batch, encode, encode_prompt, encode_target, wrap

TEXTS = (
    ("The capital of Japan is", "Japan", "Tokyo"),
    ("Marie Curie discovered", "Marie Curie", "radium and polonium."),
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "French"),
    ("He", "He", "is a civil engineer."),
)


def plain(text: str, subject: str) -> Prompt:
    start = text.index(subject)
    return Prompt(text, (start, start + len(subject)))


def rows(lm: Any, target: bool = True) -> list[Row]:
    return [encode(lm, plain(text, subject), answer if target else None) for text, subject, answer in TEXTS]


# --- hooks


class Odd(nn.Module):
    """Two steps, the first with another kind of output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Identity(), nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.second.weight)
        self.ran = 0

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = {"tensor": x, "tuple": (x, "cache"), "list": [x, "cache"]}[self.kind]
        out = self.first(kept)
        assert type(out) is type(kept)
        assert self.kind == "tensor" or out[1] == "cache"
        self.ran += 1
        return self.second(input=out if self.kind == "tensor" else out[0])


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list"])
def test_hooks_see_and_replace_hidden_states_in_any_container(kind: str) -> None:
    model, seen = Odd(kind), []
    x = torch.ones(2, 3)
    with on_output(model.first, lambda i, o: o + 1), on_input(model.second, seen.append):
        assert torch.equal(model(x), x + 1)  # the second gets its input by keyword
    with on_output(model.first, lambda i, o: seen.append(o)):
        assert torch.equal(model(x), x)
    assert torch.equal(seen[0], x + 1) and torch.equal(seen[1], x)
    assert not model.first._forward_hooks and not model.second._forward_pre_hooks
    with pytest.raises(TypeError, match="expected a tensor"):
        first_tensor({"x": x})


def test_hooks_are_removed_after_an_exception() -> None:
    model = Odd("tensor")

    def fail(*_: Tensor) -> None:
        raise StopForward

    for context in (on_output(model.first, fail), on_input(model.first, fail)):
        with pytest.raises(StopForward), context:
            model(torch.ones(1, 3))
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_a_truncated_pass_stops_at_the_input() -> None:
    model = Odd("tensor")
    run_truncated(model, model.first, x=torch.ones(1, 3))
    assert model.ran == 0
    with pytest.raises(RuntimeError, match="never reached"):
        run_truncated(model, nn.Linear(1, 1), x=torch.ones(1, 3))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_read_inputs_of_several_sites(kind: str) -> None:
    lm = tiny.lm(kind)
    modules = [lm.layout.module(lm.model, s.name) for s in lm.layout.sites([0, 1])]
    later: list[Tensor] = []
    padded = batch(rows(lm), lm.pad_id)
    with on_input(lm.layout.module(lm.model, lm.layout.site(2).name), later.append):
        seen = read_inputs(lm.model, modules, padded.inputs)
        assert len(seen) == 2 and not later and not seen[0].requires_grad
    full: list[Tensor] = []
    with on_input(modules[1], full.append), torch.no_grad():
        lm.model(**padded.inputs)
    assert torch.equal(seen[1], full[0])


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("left", [False, True])
def test_scored_positions_equal_slices_of_the_full_logits(kind: str, left: bool) -> None:
    lm = tiny.lm(kind)
    padded = batch(rows(lm), lm.pad_id, left=left)
    with torch.no_grad():
        full = lm.model(**padded.inputs, use_cache=False).logits
        some = target_logits(lm, padded)
        with at_scored_positions(lm.head, padded.targets):
            assert lm.model(**padded.inputs, use_cache=False).logits.shape[:2] == (1, len(padded.labels))
    assert torch.allclose(some, full[padded.targets], atol=1e-4)
    assert not lm.head._forward_pre_hooks


def test_a_contiguous_input_changes_nothing() -> None:
    lm = tiny.lm("gemma3_text")
    padded = batch(rows(lm), lm.pad_id)
    with torch.no_grad():
        before = lm.model(**padded.inputs, logits_to_keep=1).logits
        contiguous: list[bool] = []
        with contiguous_input(lm.head), on_input(lm.head, lambda x: contiguous.append(x.is_contiguous())):
            after = lm.model(**padded.inputs, logits_to_keep=1).logits
    assert contiguous == [True] and torch.equal(before, after)


@pytest.mark.parametrize("kind", tiny.TYPES)
def test_logits_of_hidden_states_are_the_models(kind: str) -> None:
    lm = tiny.lm(kind)
    padded, hidden = batch(rows(lm), lm.pad_id), []
    with torch.no_grad(), on_input(lm.head, lambda x: hidden.append(x)):
        full = lm.model(**padded.inputs, use_cache=False).logits
    with torch.no_grad():
        some = logits_of(lm, hidden[0][padded.targets])
    assert torch.allclose(some, full[padded.targets], atol=1e-5)
    if kind == "gemma2":  # with its soft cap, which these logits are large enough to show
        lm.model.config.final_logit_softcapping = 0.5
        with torch.no_grad():
            capped = logits_of(lm, hidden[0][padded.targets])
        assert torch.allclose(capped, 0.5 * torch.tanh(torch.atanh(full[padded.targets] / 30) * 30 / 0.5), atol=1e-4)
        assert float(capped.abs().max()) <= 0.5 < float(some.abs().max())


# --- tokens


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_stands_once_where_the_tokenizer_puts_it(add_bos: bool) -> None:
    lm = tiny.lm(chat=True, add_bos=add_bos)
    bos = lm.tokenizer.bos_token_id
    statement = encode(lm, plain(*TEXTS[0][:2]), "Tokyo").ids
    assert statement.count(bos) == add_bos and (statement[0] == bos) == add_bos
    question = encode(lm, wrap(lm, "Who?", (0, 3), question=True), "I").ids
    assert question.count(bos) == 1 and question[0] == bos  # the template of this chat model has one


def covered(lm: Any, prompt: Prompt, which: Any = "last") -> str:
    """The text under the lookup token, by decoding it."""
    ids, lookup = encode_prompt(lm, prompt, which)
    return lm.tokenizer.decode([ids[lookup]])


@pytest.mark.parametrize(
    ("text", "start", "subject"),
    [
        ("Paris and Paris and Paris is", 10, "Paris"),
        ("In the town of Žďár nad Sázavou lives", 15, "Žďár nad Sázavou"),
        ("The kanji 数学 means", 10, "数学"),
        ("A smile 😀 means", 8, "😀"),
        ("The set {x} of {} and {0!r} is", 15, "{}"),
        ("%s of 100% is", 6, "100%"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "Because {} 数. "])
def test_the_subject_is_found_by_offsets(text: str, start: int, subject: str, prefix: str) -> None:
    lm = tiny.lm()
    assert text[start : start + len(subject)] == subject
    prompt = wrap(lm, text, (start, start + len(subject)), question=False, prefix=prefix)
    assert prompt.text == prefix + text and prompt.text[slice(*prompt.subject)] == subject
    ids, last = encode_prompt(lm, prompt)
    _, first = encode_prompt(lm, prompt, "first")
    offsets = lm.tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]
    head, tail = lm.tokenizer.decode(ids[1:first]), lm.tokenizer.decode(ids[last + 1 :])
    assert prompt.text.startswith(head) and len(head) <= prompt.subject[0]
    assert prompt.text.endswith(tail) and len(tail) <= len(prompt.text) - prompt.subject[1]
    assert offsets[last][0] < prompt.subject[1] <= offsets[last + 1][1]
    assert encode_prompt(lm, prompt, "prompt_last") == (ids, len(ids) - 1)


def test_which_of_two_equal_words_is_the_subject() -> None:
    lm = tiny.lm()
    first, second = (encode_prompt(lm, Prompt("Paris or Paris", (s, s + 5)))[1] for s in (0, 9))
    assert 0 < first < second == len(encode_prompt(lm, Prompt("Paris or Paris", (0, 5)))[0]) - 1


def test_a_subject_without_a_token_is_an_error() -> None:
    with pytest.raises(InputError, match="no token of 'Who is it' covers its subject ''"):
        encode_prompt(tiny.lm(), Prompt("Who is it", (3, 3)))


@pytest.mark.parametrize("chat", [False, True])
def test_a_target_ends_with_the_end_token(chat: bool) -> None:
    lm = tiny.lm(chat=chat)
    prompt = wrap(lm, "Who wrote the book?", (14, 18), question=True)
    row = encode(lm, prompt, "I don't know.")
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>" if chat else "</s>")
    assert row.ids[-1] == end == lm.end_id and end not in row.ids[row.prompt_length : -1]
    space = "" if chat else " "  # a template ends where the answer begins
    assert lm.tokenizer.decode(row.ids[row.prompt_length : -1]) == space + "I don't know."
    assert encode(lm, prompt, "").ids == (*row.ids[: row.prompt_length], end)
    assert encode(lm, prompt).ids == row.ids[: row.prompt_length]


def test_the_target_is_cut_out_of_the_joint_encoding() -> None:
    lm = tiny.lm()
    for text, joint in (("It is", "It is in Paris"), ("It is ", "It is in Paris"), ("It is\n", "It is\nin Paris")):
        ids, _ = encode_prompt(lm, Prompt(text, (0, 2)))
        target = encode_target(lm, Prompt(text, (0, 2)), ids, "in Paris")
        assert lm.tokenizer.decode(ids[1:] + target[:-1]) == joint
    ids, _ = encode_prompt(lm, Prompt("It is", (0, 2)))
    with_space, without = (encode_target(lm, Prompt("It is", (0, 2)), ids, target) for target in (" in", "in"))
    assert with_space == without


def test_a_tokenizer_that_closes_every_text() -> None:
    from tokenizers import processors

    lm = tiny.lm()
    lm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    row = encode(lm, plain(*TEXTS[0][:2]), "Tokyo")
    assert row.ids == encode(tiny.lm(), plain(*TEXTS[0][:2]), "Tokyo").ids and row.ids.count(1) == 1


def test_the_chat_template_wraps_once_and_statements_stay_bare() -> None:
    lm = tiny.lm(chat=True)
    text = "Who wrote {the} book?"
    question = wrap(lm, text, (4, 9), question=True, prefix="Well. ")
    assert question.templated and question.text.count("<|start|>") == 2
    assert question.text == f"<s><|start|>user\nWell. {text}<|end|>\n<|start|>assistant\n"
    assert question.text[slice(*question.subject)] == "wrote"
    ids, lookup = encode_prompt(lm, question)
    assert lm.tokenizer.decode(ids[: lookup + 1]).endswith("Well. Who wrote")
    statement = wrap(lm, "The author is", (4, 10), question=False)
    assert statement == Prompt("The author is", (4, 10))
    bare = wrap(tiny.lm(), text, (4, 9), question=True, prefix="Well. ")
    assert bare.text == f"Well. Question: {text}\nAnswer:" and bare.text[slice(*bare.subject)] == "wrote"


def test_a_question_that_stands_in_the_template_too() -> None:
    lm = tiny.lm(chat=True)
    prompt = wrap(lm, "assistant", (0, 9), question=True)
    assert prompt.text[: prompt.subject[0]] == "<s><|start|>user\n"


def test_a_template_that_changes_the_text_is_an_error() -> None:
    lm = tiny.lm(chat=True)
    lm.tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(InputError, match="changes the user's text"):
        wrap(lm, "Who?", (0, 3), question=True)


# --- batches


@pytest.mark.parametrize("left", [False, True])
def test_a_batch_knows_where_everything_is(left: bool) -> None:
    lm = tiny.lm()
    made = rows(lm)
    padded = batch(made, lm.pad_id, left=left)
    labels = []
    for i, row in enumerate(made):
        mine = padded.input_ids[i][padded.attention_mask[i].bool()]
        assert tuple(mine.tolist()) == row.ids
        assert padded.position_ids[i][padded.attention_mask[i].bool()].tolist() == list(range(len(row.ids)))
        assert padded.input_ids[i, padded.lookup[i]] == row.ids[row.lookup]
        assert padded.input_ids[i, padded.last[i]] == row.ids[row.prompt_length - 1]
        predicted = padded.targets[i].nonzero()[:, 0] + 1
        assert padded.input_ids[i, predicted].tolist() == list(row.ids[row.prompt_length :])
        assert int((padded.owners == i).sum()) == len(predicted)
        labels += row.ids[row.prompt_length :]
    assert padded.labels.tolist() == labels


@pytest.mark.parametrize("kind", tiny.TYPES)
def test_padding_on_either_side_or_none_is_the_same(kind: str) -> None:
    lm = tiny.lm(kind)
    made = rows(lm)
    sites = lm.layout.sites([0, 2])
    modules = [lm.layout.module(lm.model, s.name) for s in sites]
    results, found = [], []
    with torch.no_grad():
        for left in (False, True):
            padded = batch(made, lm.pad_id, left=left)
            results.append(target_logits(lm, padded))
            seen = [x.reshape(*padded.input_ids.shape, -1) for x in read_inputs(lm.model, modules, padded.inputs)]
            found.append([x[torch.arange(len(made)), padded.lookup] for x in seen])
        alone = torch.cat([target_logits(lm, batch([row], lm.pad_id)) for row in made])
    assert torch.allclose(*results, atol=2e-4) and torch.allclose(results[0], alone, atol=2e-4)
    for one, other, site in zip(*found, sites, strict=True):
        assert torch.allclose(one, other, atol=2e-4)
        assert torch.allclose(one, keys.collect(lm, made, [site])[site.name], atol=2e-4)


# --- generation


def prompts(lm: Any) -> list[Prompt]:
    return [plain(text, subject) for text, subject, _ in TEXTS]


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

    def scarce(lm: Any, rows: list[list[int]], *more: Any) -> list[str]:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return decode(lm, rows, *more)

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
