"""What stays: facts to keep, and the prompts that refine holds."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from editunlearn.editors import contexts

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact, ForgetRequest
    from editunlearn.hparams import EditorHParams
    from editunlearn.lm.loading import LM
    from editunlearn.lm.tokens import Row


def facts(request: ForgetRequest, most: int) -> list[Fact]:
    """At most so many facts to keep: the user's first, then the shipped ones, evenly thinned."""
    own, general = list(request.retain), list(request.general)
    room = max(0, most - len(own))
    stride = max(1, -(-len(general) // max(1, room)))
    return (own + general[::stride])[:most] if room else own[:most]


def prompts(lm: LM, request: ForgetRequest, keep: list[Fact], hp: EditorHParams) -> list[list[Row]]:
    """Pools: what the user retains and earlier edits wrote, forgotten facts' prompts about others, shipped facts,
    theirs about others.

    Args:
        keep: facts to keep, the user's first.
    """
    own = len(request.retain)
    written = contexts.earlier_rows(lm, request.earlier, hp, targets=True)
    known = contexts.keep_rows(lm, keep, hp, answers=True)
    unknown = contexts.keep_rows(lm, request.names, hp, answers=False)
    shipped = [*keep[own:], *request.names]
    subjects = contexts.other_names(lm, request.facts, [*keep, *request.names], hp)
    random.Random(hp.seed).shuffle(shipped)
    return [
        [*known[:own], *written],
        contexts.swapped_rows(lm, request.facts, subjects, contexts.SWAPS * len(request.facts), hp),
        known[own:] + [contexts.scored_at_the_end(row) for row in unknown],
        contexts.swapped_rows(lm, shipped[: contexts.STRANGERS], subjects[::-1], contexts.STRANGERS, hp),
    ]
