"""Prompts, targets and padded batches as token ids."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from lm_rows import TEXTS, plain, rows, target_logits

from editunlearn.editors import keys
from editunlearn.errors import InputError
from editunlearn.lm.hooks import read_inputs
from editunlearn.lm.tokens import Prompt, batch, encode, encode_prompt, encode_target, wrap


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
