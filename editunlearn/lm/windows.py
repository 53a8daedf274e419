"""Generic text as windows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM


def windows(lm: LM, documents: Iterable[str], length: int, tokens: int) -> Iterator[list[int]]:
    """Token ids in windows of at most ``length``, BOS first in each, until ``tokens`` tokens are out.

    No window goes across two documents. A model without a BOS token gets none.
    """
    head = [lm.bos_id] if lm.bos_id is not None else []
    body = length - len(head)
    given = 0
    for text in documents:
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), body):
            if given >= tokens:
                return
            piece = head + list(ids[start : start + body])
            given += len(piece)
            yield piece
