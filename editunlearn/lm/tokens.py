"""From text to token ids, once: prompts with the subject located by offsets, targets of known length, padded batches.

Nothing is decoded and encoded again, and user text never goes through ``str.format``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from editunlearn.errors import InputError

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

SubjectToken = Literal["last_word", "last", "first", "prompt_last"]
PLAIN_QUESTION = ("Question: ", "\nAnswer:")
"""What stands around a bare question for a model without a chat template."""
MARK = "\ue000"
"""A character that no template has, to see where the user's text goes."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model will see it, before tokenising.

    Attributes:
        text: the whole text, template included.
        subject: character span of the subject in ``text``.
        templated: True when a chat template made the text, special tokens included.
        ids: tokens in place of the tokenizer's own, special ones included; they decode to the same text.
    """

    text: str
    subject: tuple[int, int]
    templated: bool = False
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Row:
    """Token ids of one sequence.

    Attributes:
        ids: prompt then target.
        lookup: index of the token whose key and value are edited.
        prompt_length: number of prompt tokens; the target begins here.
    """

    ids: tuple[int, ...]
    lookup: int
    prompt_length: int


def wrap(lm: LM, text: str, subject: tuple[int, int], *, question: bool, prefix: str = "") -> Prompt:
    """Put the chat template or the plain question frame around ``text``.

    Statements to be completed (``question`` False) stay bare, since a completion has no turn to end. ``prefix`` goes
    before the text (inside the user's turn when there is one).
    """
    if question and lm.has_chat:
        whole = lm.chat.render(lm.tokenizer, prefix + text)
        # The text may stand in the template's own words as well, so that it is not looked for.
        head = lm.chat.render(lm.tokenizer, MARK).partition(MARK)[0]
        if not whole.startswith(head + prefix + text):
            raise InputError(
                f"the chat template of {lm.name} changes the user's text; it cannot be located in {whole!r}"
            )
        start = len(head) + len(prefix)
        return Prompt(whole, (start + subject[0], start + subject[1]), templated=True)
    before, after = PLAIN_QUESTION if question else ("", "")
    offset = len(prefix) + len(before)
    return Prompt(prefix + before + text + after, (offset + subject[0], offset + subject[1]))


def encode_prompt(lm: LM, prompt: Prompt, subject_token: SubjectToken = "last") -> tuple[list[int], int]:
    """Token ids of a prompt (BOS once, as the tokenizer or the template puts it) and the index of its lookup token.

    Raises:
        InputError: the tokenizer gives no token for the subject.
        ValueError: a prompt with ids of its own has no known place of its subject, only an end.
    """
    if prompt.ids is not None:
        if subject_token != "prompt_last":
            raise ValueError(f"the tokens of {prompt.text!r} are given; {subject_token!r} cannot be found among them")
        return list(prompt.ids), len(prompt.ids) - 1
    ids, offsets = _with_offsets(lm, prompt)
    if subject_token == "prompt_last":
        return ids, len(ids) - 1
    inside = _inside(prompt, offsets)
    if subject_token == "last_word":
        start, end = prompt.subject
        own = [prompt.text[max(offsets[i][0], start) : min(offsets[i][1], end)] for i in inside]
        words = [i for i, text in zip(inside, own, strict=True) if any(c.isalnum() for c in text)]
        return ids, (words or inside)[-1]
    return ids, inside[-1] if subject_token == "last" else inside[0]


def subject_tokens(lm: LM, prompt: Prompt) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and the indices of all tokens of its subject.

    Raises:
        InputError: the tokenizer gives no token for the subject.
    """
    ids, offsets = _with_offsets(lm, prompt)
    return ids, _inside(prompt, offsets)


def _with_offsets(lm: LM, prompt: Prompt) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = lm.tokenizer(prompt.text, add_special_tokens=not prompt.templated, return_offsets_mapping=True)
    return _without_eos(lm, list(encoded["input_ids"]), encoded["offset_mapping"])


def _inside(prompt: Prompt, offsets: list[tuple[int, int]]) -> list[int]:
    start, end = prompt.subject
    inside = [i for i, (a, b) in enumerate(offsets) if b > a and a < end and b > start]
    if not inside:
        raise InputError(f"no token of {prompt.text!r} covers its subject {prompt.text[start:end]!r}")
    return inside


def _without_eos(lm: LM, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Some tokenizers close every text with EOS; a prompt must stay open."""
    while len(ids) > 1 and ids[-1] in lm.eos_ids and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]
    return ids, offsets


def encode_target(lm: LM, prompt: Prompt, prompt_ids: Sequence[int], target: str) -> list[int]:
    """Ids of what the model is to say after the prompt, closed by the end-of-turn token.

    An empty target is that token alone. Others are cut out of the encoding of prompt and target together where that
    begins with the prompt's own ids (so that the first token is the one that the model would write), else encoded by
    themselves.
    """
    end = [lm.end_id]
    if not target:
        return end
    space = "" if prompt.templated or not prompt.text or prompt.text[-1].isspace() or target[0].isspace() else " "
    joint = lm.tokenizer(prompt.text + space + target, add_special_tokens=not prompt.templated)["input_ids"]
    joint = [int(i) for i in joint]
    while joint and joint[-1] in lm.eos_ids:
        joint = joint[:-1]
    n = len(prompt_ids)
    if joint[:n] == list(prompt_ids) and len(joint) > n:
        return joint[n:] + end
    return [int(i) for i in lm.tokenizer(space + target, add_special_tokens=False)["input_ids"]] + end


def encode(lm: LM, prompt: Prompt, target: str | None = None, subject_token: SubjectToken = "last") -> Row:
    """A :class:`Row` of a prompt alone, or with its target."""
    ids, lookup = encode_prompt(lm, prompt, subject_token)
    tail = encode_target(lm, prompt, ids, target) if target is not None else []
    return Row(tuple(ids + tail), lookup, len(ids))


def until_lookup(row: Row) -> Row:
    """The row up to its lookup token: attention is causal, so nothing behind changes what happens there."""
    return Row(row.ids[: row.lookup + 1], row.lookup, row.lookup + 1)


@dataclass(frozen=True)
class Batch:
    """Padded rows on the model's device.

    Attributes:
        input_ids, attention_mask, position_ids: (batch, length) int64; padding has mask 0.
        lookup: (batch,) index of the lookup token in the padded row.
        targets: (batch, length) bool, True where the NEXT token is a target token, that is, where it is predicted.
        labels: (number of target tokens,) ids, in the row-major order of ``targets``.
        owners: (number of target tokens,) row of each label.
        last: (batch,) index of the last prompt token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    lookup: Tensor
    targets: Tensor
    labels: Tensor
    owners: Tensor
    last: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def but_last(self) -> Batch:
        """Without the last column: nothing is behind it to be predicted, so that it need not be run.

        Rows are padded on the right and have targets.
        """
        names = ("input_ids", "attention_mask", "position_ids", "targets")
        return replace(self, **{name: getattr(self, name)[:, :-1] for name in names})

    def at_lookup(self, states: Tensor) -> Tensor:
        """What stands at each row's lookup token, (batch, width), of a module's states on whatever device it runs."""
        flat = states.reshape(*self.input_ids.shape, -1)
        return flat[torch.arange(len(flat), device=flat.device), self.lookup.to(flat.device)]


def batch(rows: Sequence[Row], pad_id: int, device: torch.device | str = "cpu", *, left: bool = False) -> Batch:
    """Pad ``rows`` on one side. Either side gives the same results: masks and positions follow the tokens."""
    width = max(len(r.ids) for r in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    targets = torch.zeros(shape, dtype=torch.bool)
    starts = torch.tensor([width - len(r.ids) if left else 0 for r in rows])
    labels: list[int] = []
    for i, (row, start) in enumerate(zip(rows, starts.tolist(), strict=True)):
        end = start + len(row.ids)
        ids[i, start:end] = torch.tensor(row.ids)
        mask[i, start:end] = 1
        targets[i, start + row.prompt_length - 1 : end - 1] = True
        labels.extend(row.ids[row.prompt_length :])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = Batch(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        lookup=starts + torch.tensor([r.lookup for r in rows]),
        targets=targets,
        labels=torch.tensor(labels, dtype=torch.long),
        owners=targets.nonzero()[:, 0],
        last=starts + torch.tensor([r.prompt_length - 1 for r in rows]),
    )
    return Batch(**{name: value.to(device) for name, value in vars(out).items()})
