"""Wrong labels, token by token: random ones, or the unedited model's second choices (arXiv 2402.15159).

The model still reads the true answer; only what it is to predict from it is wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from editunlearn.lm.head import Head
from editunlearn.lm.likelihood import states_of
from editunlearn.unlearners import rows
from editunlearn.unlearners.labels import likeliest_others, random_tokens
from editunlearn.unlearners.rows import Pool

if TYPE_CHECKING:
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.lm.loading import LM


def random(lm: LM, request: ForgetRequest, seed: int) -> Pool:
    """Labels drawn once, uniformly from all tokens that are not special ones."""
    pool = rows.forget(lm, request)
    special = set(lm.tokenizer.all_special_ids)
    allowed = torch.tensor([i for i in range(len(lm.tokenizer)) if i not in special])
    true = [torch.tensor(row.ids[row.prompt_length :]) for row in pool.rows]
    found = random_tokens(torch.cat(true), allowed, seed)
    return replace(pool, labels=list(torch.split(found, [len(t) for t in true])))


@torch.no_grad()
def second_choice(lm: LM, request: ForgetRequest) -> Pool:
    """At each position the unedited model's likeliest token other than the true one there."""
    pool, head = rows.forget(lm, request), Head(lm)
    labels = []
    for row, states in zip(pool.rows, states_of(lm, pool.rows), strict=True):
        logits = torch.cat([piece.clone() for piece in head.logits(states)])
        labels.append(likeliest_others(logits, torch.tensor(row.ids[row.prompt_length :], device=logits.device)))
    return replace(pool, labels=labels)
