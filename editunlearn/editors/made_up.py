"""Names that no list contains: put together from the capitalised words of the tokenizer's own vocabulary.

What is to stay is mostly about names that nobody wrote down. The shipped facts name the famous ones; a vocabulary of a
modern model has tens of thousands of further pieces of names, so that prompts about names made of them show how an edit
treats the names that it has never seen.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from editunlearn.lm.loading import LM

WORD = re.compile(r"[ ▁Ġ]([A-Z][a-z]{2,})")  # a space as sentencepiece and byte-level BPE spell it

LENGTHS = {1: 0.3, 2: 0.5, 3: 0.2}
"""Words in a name, and how often."""


def capitalised_words(lm: LM) -> list[str]:
    """Words of one token that begin like a name, in the order of their ids; some tokenizers have none."""
    vocabulary = sorted(lm.tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    return list(dict.fromkeys(found[1] for token, _ in vocabulary if (found := WORD.fullmatch(token))))


def name(words: list[str], draw: random.Random) -> str:
    """One name of one to three ``words``."""
    (count,) = draw.choices(list(LENGTHS), list(LENGTHS.values()))
    return " ".join(draw.choice(words) for _ in range(count))
