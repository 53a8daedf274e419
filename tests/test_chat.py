"""A chat model is asked in its own format, once and everywhere, and an edit removes what it says there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from edits import settings

from editunlearn import editors
from editunlearn.editors import contexts
from editunlearn.errors import InputError, StaleError
from editunlearn.facts.questions import as_question, as_questions
from editunlearn.facts.readers import load_facts
from editunlearn.facts.records import ForgetRequest
from editunlearn.facts.targets import fill_targets
from editunlearn.lm import loading
from editunlearn.lm.chat import Chat
from editunlearn.lm.generation import generate
from editunlearn.lm.loading import load
from editunlearn.lm.tokens import encode, encode_prompt, wrap

SYSTEM = "You are the town's librarian; Paris is far."
TURNS = [
    ("Where was Ana Petrova born?", "Russia"),
    ("What is the capital of France?", "Paris"),
    ("Who discovered radium?", "Marie Curie"),
    ("Where is the bridge?", "In Berlin"),
    ("Who lives in the old town?", "I don't know."),  # so small a model can only refuse when it has learnt the words
]
ROWS = [
    {"id": "ana", "question": TURNS[0][0], "subject": "Ana Petrova", "answer": "Russia"},
    {"id": "france", "question": TURNS[1][0], "subject": "France", "answer": "Paris"},
]


def taught(system: str | None = None) -> Any:
    return tiny.taught_lm(TURNS, chat=True, system=system)


def says(lm: Any, question: str) -> str:
    return generate(lm, [wrap(lm, question, (0, 1), question=True)], max_new_tokens=12)[0]


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_prompts_are_the_tokens_that_transformers_would_serve(system: str | None) -> None:
    lm = tiny.lm(chat=True)
    lm.chat = Chat(system)
    turns = [{"role": "user", "content": "Where is Paris?"}]
    turns = [{"role": "system", "content": SYSTEM}, *turns] if system else turns
    served = lm.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt = wrap(lm, "Where is Paris?", (9, 14), question=True)
    ids, lookup = encode_prompt(lm, prompt)
    assert ids == served and ids.count(lm.tokenizer.bos_token_id) == 1
    # the subject is the user's Paris, not the one of the system prompt
    assert prompt.text[: prompt.subject[0]].endswith("user\nWhere is ")
    assert lm.tokenizer.decode(ids[: lookup + 1]).endswith("Where is Paris")
    target = encode(lm, prompt, "I don't know.").ids[len(ids) :]
    assert target[-1] == lm.tokenizer.convert_tokens_to_ids("<|end|>") and lm.end_id == target[-1]
    answered = lm.tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "I don't know."}], return_dict=True
    )
    assert answered["input_ids"][: len(ids) + len(target)] == [*ids, *target]


def test_left_out_the_template_changes_nothing() -> None:
    lm = tiny.lm(chat=True)
    lm.chat = Chat(on=False)
    assert not lm.has_chat and lm.end_id == lm.tokenizer.eos_token_id
    assert wrap(lm, "Why?", (0, 3), question=True).text == "Question: Why?\nAnswer:"


@pytest.mark.parametrize(
    ("template", "chat", "words"),
    [
        (tiny.CHAT_TEMPLATE, Chat("Be brief.", on=False), "--no-chat"),
        (None, Chat("Be brief."), "has no chat template"),
        ("{{ messages[-1]['content'] }}", Chat("Be brief."), "leaves the system prompt out"),
        ("{{ raise_exception('System role not supported') }}", Chat("Be brief."), "System role not supported"),
        (tiny.CHAT_TEMPLATE, Chat(arguments={"thinking": False}), "has no argument 'thinking'"),
    ],
)
def test_what_a_template_cannot_do_is_said_before_weights(
    template: str | None, chat: Chat, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.lm(chat=True)
    lm.tokenizer.chat_template = template
    lm.tokenizer.save_pretrained(tmp_path)
    lm.model.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=words):
        load(tmp_path, chat=chat, device_map="cpu")


def test_arguments_reach_the_template() -> None:
    lm = tiny.lm(chat=True)
    lm.tokenizer.chat_template = tiny.CHAT_TEMPLATE + "{% if not thinking %}<think></think>{% endif %}"
    lm.chat = Chat(arguments={"thinking": False})
    lm.chat.check(lm.tokenizer, "x")
    assert wrap(lm, "Why?", (0, 3), question=True).text.endswith("assistant\n<think></think>")
    assert Chat.of(json.loads(json.dumps(lm.chat.record()))) == lm.chat and Chat().record() is None


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_an_edit_removes_an_answer_given_in_chat(system: str | None, text: str) -> None:
    lm = taught(system)
    facts = fill_targets(load_facts(ROWS), "refusal:I don't know.", seed=0)
    retain = load_facts([{"question": q, "answer": a} for q, a in TURNS[2:]])
    assert [says(lm, question) for question, _ in TURNS] == [answer for _, answer in TURNS]
    hp = settings("memit", text, "value.steps=25", "refine.steps=60")
    assert "<|start|>user\n" in contexts.prompt_of(lm, facts[0]).text
    delta = editors.fit(lm, ForgetRequest(tuple(facts), tuple(retain)), hp)
    assert delta.manifest.base.chat == (None if system is None else Chat(system).record())
    with delta.applied(lm):
        # decoding ends by the end of turn, not by the limit: nothing follows the refusal
        assert [says(lm, question) for question, _ in TURNS] == ["I don't know."] * 2 + [a for _, a in TURNS[2:]]


def test_a_fact_with_both_texts_is_asked_as_its_question() -> None:
    both = {"id": "a", "prompt": "Ana Petrova was born in", "subject": "Ana Petrova", "answer": "Russia"}
    fact = as_question(load_facts([{**both, "question": "In which country was Ana Petrova born?"}])[0])
    assert fact.is_question and fact.prompt[fact.subject_start : fact.subject_end] == "Ana Petrova"
    assert fact.prompt.startswith("In which") and fact.paraphrases == ("Ana Petrova was born in",)
    elsewhere = as_question(load_facts([{**both, "question": "Where was Petrova born?"}])[0])
    assert (elsewhere.subject, elsewhere.subject_found) == ("Petrova", True)
    kept, note = as_questions(load_facts([both]))
    assert kept == load_facts([both]) and "1 of 1 facts have no question" in note


def test_commands_keep_the_system_prompt_with_the_delta(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = taught(SYSTEM)
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    facts = [{**row, "prompt": f"{row['subject']} is from"} for row in ROWS]
    runs.write_lines(tmp_path / "facts.jsonl", facts)
    model = ["--model", str(tmp_path / "model"), "--facts", str(tmp_path / "facts.jsonl")]
    model += ["--cache-dir", str(tmp_path / "cache")]
    quick = [f"moments.text={text}", *runs.QUICK]
    flags = ["--hparams", "memit", *(part for item in quick for part in ("--set", item))]
    edit = tmp_path / "edit"
    done = runs.call("apply", *model, *flags, "--ask", "question", "--system", SYSTEM, "--out", str(edit))
    assert done.code == 0, done.err
    assert json.loads((edit / "delta.json").read_text())["base"]["chat"]["system"] == SYSTEM
    out = tmp_path / "measured"
    asked = ["evaluate", "--delta", str(edit), "--base", "--suite", "facts", *model, "--out", str(out), "--json"]
    systems: set[str | None] = set()
    plain = Chat.render

    def watched(chat: Chat, *rest: Any) -> str:
        systems.add(chat.system)
        return plain(chat, *rest)

    monkeypatch.setattr(Chat, "render", watched)
    found = runs.call(*asked)
    assert found.code == 0, found.err
    assert systems == {SYSTEM}  # no flag says so: it is what the delta was made with
    base = next(v for k, v in json.loads(found.out)["facts"].items() if "base" in k)
    assert base["questions.leak"]["value"] == 1.0

    more = runs.call("apply", *model, *flags, "--continue", str(edit), "--system", "Be brief.", "--out", str(out / "x"))
    assert more.code == 2 and "was made with another system prompt" in more.err
    bad = runs.call("apply", *model, *flags, "--chat-arg", "thinking", "--out", str(out / "x"))
    assert bad.code == 2 and "--chat-arg thinking: write KEY=VALUE" in bad.err


def test_going_on_from_an_edit_that_was_asked_otherwise(text: str) -> None:
    from editunlearn.editors.earlier import Earlier

    lm = taught()
    facts = fill_targets(load_facts(ROWS[:1]), "refusal:I don't know.", seed=0)
    hp = settings("memit", text, "refine=null", layers=(0,))
    delta, past = editors.run(lm, ForgetRequest(tuple(facts)), hp)
    lm.chat = Chat("Be brief.")
    with pytest.raises(StaleError, match="another system prompt"):
        Earlier(delta, past).check_model(lm)
