"""Multiple-choice questions, asked like MMLU: the likeliest letter counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from editunlearn.errors import InputError
from editunlearn.evaluation.probes import Probe
from editunlearn.lm.configs import context_length
from editunlearn.lm.tokens import Prompt

if TYPE_CHECKING:
    from editunlearn.evaluation.suites import Record
    from editunlearn.lm.loading import LM

LETTERS = "ABCDEFGHIJ"


def check_choices(records: Sequence[Record], place: str) -> None:
    """Raise InputError unless each record's ``answer`` is the number of one of its ``choices``, two at least."""
    for number, record in enumerate(records):
        choices, answer = record["choices"], record["answer"]
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise InputError(
                f"{place}: record {number}: 'choices' is a list of 2 to {len(LETTERS)} texts; it is {choices!r}."
            )
        if answer not in range(len(choices)):
            raise InputError(
                f"{place}: record {number}: 'answer' is a number from 0 to {len(choices) - 1}; it is {answer!r}."
            )


def choice_probe(lm: LM, record: Record, *, examples: Sequence[Any] = (), topic: str = "") -> Probe:
    """A probe whose answers are letters.

    Never in a chat template: the published numbers (MMLU, WMDP) are of plain text.

    Args:
        record: ``question``, ``choices`` and ``answer``, the number of the right one.
        examples: more of them, shown with their answers.
        topic: named in the first line.
    """
    about = f" about {topic}" if topic else ""
    head = f"The following are multiple choice questions (with answers){about}.\n\n"
    shots = [f"{_shown(example)} {LETTERS[int(example['answer'])]}\n\n" for example in examples]
    most = context_length(lm.model.config)
    text = head + "".join(shots) + _shown(record)
    while shots and most and len(lm.tokenizer(text)["input_ids"]) + 2 > most:  # fewer examples where all do not fit
        shots.pop()
        text = head + "".join(shots) + _shown(record)
    letters = LETTERS[: len(record["choices"])]
    right = letters[int(record["answer"])]
    wrong = tuple(letter for letter in letters if letter != right)
    return Probe(Prompt(text, (0, 0)), str(record["question"]), right, wrong=wrong)


def _shown(record: Record) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, record["choices"], strict=False))
    return f"{str(record['question']).strip()}\n{choices}\nAnswer:"
