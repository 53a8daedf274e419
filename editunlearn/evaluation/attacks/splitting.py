"""The same text in other tokens: an edit keyed to a subject's usual tokens may not know it in pieces."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editunlearn.lm.tokens import Prompt, encode_prompt

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM


@dataclass(frozen=True)
class Split:
    """How tokens are split.

    Attributes:
        whole: as far as the vocabulary allows, mostly into single characters; else once, at a drawn place.
        seed: of the places.
    """

    whole: bool
    seed: int


def split_subject(lm: LM, prompt: Prompt, how: Split) -> Prompt | None:
    """The prompt with token ids of its own, in which the tokens of its subject are split.

    Returns:
        None when nothing could be split so that the ids still decode to the same text.
    """
    ids, _ = encode_prompt(lm, prompt, "prompt_last")
    offsets = lm.tokenizer(prompt.text, add_special_tokens=not prompt.templated, return_offsets_mapping=True)
    start, end = prompt.subject
    draw = random.Random(how.seed)
    made: list[int] = []
    for token, (first, last) in zip(ids, offsets["offset_mapping"], strict=False):  # a closing EOS is not in ids
        inside = last > first and first < end and last > start
        made += _pieces(lm, token, how, draw) if inside else [token]
    same = lm.tokenizer.decode(made) == lm.tokenizer.decode(ids)
    return replace(prompt, ids=tuple(made)) if made != ids and same else None


def _pieces(lm: LM, token: int, how: Split, draw: random.Random) -> Sequence[int]:
    """Two or more tokens that are written one behind the other like this one; itself alone where there are none.

    Of several bytes of one character a piece would be no text; such tokens stay when the pieces do not decode alike.
    """
    text = str(lm.tokenizer.convert_ids_to_tokens(token))
    pairs = [(_id(lm, text[:cut]), _id(lm, text[cut:])) for cut in range(1, len(text))]
    said = lm.tokenizer.decode([token])
    found = [
        (left, right)
        for left, right in pairs
        if left is not None and right is not None and lm.tokenizer.decode([left, right]) == said
    ]
    if not found:
        return [token]
    left, right = found[0] if how.whole else draw.choice(found)
    return [*_pieces(lm, left, how, draw), *_pieces(lm, right, how, draw)] if how.whole else [left, right]


def _id(lm: LM, text: str) -> int | None:
    """Of exactly this token; None: there is none (the tokenizer then gives the unknown one, or nothing)."""
    found = lm.tokenizer.convert_tokens_to_ids(text)
    return found if isinstance(found, int) and lm.tokenizer.convert_ids_to_tokens(found) == text else None
