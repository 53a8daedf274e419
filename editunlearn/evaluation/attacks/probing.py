"""Probing: whether the answer can still be read from the states inside, whatever the model says in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.blocks import skipping
from editunlearn.lm.head import Head
from editunlearn.lm.likelihood import states_of
from editunlearn.lm.tokens import Row
from editunlearn.numerics.regression import ridge

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

RIDGE = 0.01
"""Of the linear map, relative to the mean square of what it reads."""


@dataclass(frozen=True)
class Lens:
    """What is read after each block.

    Attributes:
        log_probability: of the answer's first token, nats, (blocks, rows).
        rank: how many tokens are likelier, 0: it is the first, (blocks, rows).
    """

    log_probability: Tensor
    rank: Tensor

    def readable(self, within: int = 1) -> Tensor:
        """By row, whether the answer's first token is among the ``within`` likeliest after any block, (rows,) bool."""
        return (self.rank < within).any(0)


@torch.no_grad()
def logit_lens(
    lm: LM, rows: Sequence[Row], text: Sequence[Row] = (), *, done: Callable[[int], None] = lambda _: None
) -> Lens:
    """The next-token distribution at the end of each prompt if the model ended after each of its blocks.

    Later blocks hand their input on, and the model's own last norm and head do the rest, so that nothing is written
    down here about an architecture (nostalgebraist 2020; early blocks do not write for the head: read them with care).

    With ``text`` it is a linear probe: what each block leaves is first mapped to what the last one would, by a ridge
    regression over the positions of that text. It is the tuned lens (Belrose et al. 2023, arXiv 2303.08112) with least
    squares in the place of training, and needs no answer but the ones that are looked for.

    Args:
        rows: prompt with answer; the answer's first token is looked for.
        text: whose targets are the positions to learn from; several times as many as the model is wide.
        done: called with 1 after every block.

    Raises:
        ValueError: a row has no answer.
    """
    if any(row.prompt_length >= len(row.ids) for row in rows):
        raise ValueError("logit_lens: a row has no answer to look for")
    blocks = lm.layout.num_layers(lm.model)
    asked = [replace(row, ids=row.ids[: row.prompt_length + 1]) for row in rows]
    wanted = torch.tensor([row.ids[-1] for row in asked], device=lm.device)[:, None]
    head = Head(lm)
    final = torch.cat(states_of(lm, text)) if text else None
    log_p, rank = torch.zeros(blocks, len(rows)), torch.zeros(blocks, len(rows), dtype=torch.long)
    for block in range(blocks):
        with skipping(lm, range(block + 1, blocks)):
            states = torch.cat(states_of(lm, asked))
            if final is not None:
                states = ridge(torch.cat(states_of(lm, text)).float(), final.float(), RIDGE)(states.float()).to(states)
        start = 0
        for logits in head.logits(states):
            found = logits.float().log_softmax(-1)
            part = slice(start, start := start + len(found))
            own = found.gather(1, wanted[part])
            log_p[block, part] = own[:, 0].cpu()
            rank[block, part] = (found > own).sum(-1).cpu()
        done(1)
    return Lens(log_p, rank)
