"""Probing: whether the answer can still be read from the states inside, whatever the model says in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.head import hidden_of, logits_of
from editunlearn.lm.resume import skipping
from editunlearn.lm.tokens import Row, batch

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM


@dataclass(frozen=True)
class Lens:
    """What the logit lens reads after each block.

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
def logit_lens(lm: LM, rows: Sequence[Row]) -> Lens:
    """The next-token distribution at the end of each prompt if the model ended after each of its blocks.

    Later blocks hand their input on, and the model's own last norm and head do the rest, so that nothing is written
    down here about an architecture (nostalgebraist 2020; early blocks do not write for the head: read them with care).

    Args:
        rows: prompt with answer; the answer's first token is looked for.

    Raises:
        ValueError: a row has no answer.
    """
    if any(row.prompt_length >= len(row.ids) for row in rows):
        raise ValueError("logit_lens: a row has no answer to look for")
    blocks = lm.layout.num_layers(lm.model)
    log_p, rank = torch.zeros(blocks, len(rows)), torch.zeros(blocks, len(rows), dtype=torch.long)
    prompts = [Row(row.ids[: row.prompt_length], 0, row.prompt_length) for row in rows]
    wanted = torch.tensor([row.ids[row.prompt_length] for row in rows])

    def run(part: Sequence[int]) -> None:
        padded = batch([prompts[i] for i in part], lm.pad_id, lm.device)
        last = torch.zeros_like(padded.input_ids, dtype=torch.bool)
        last[torch.arange(len(part), device=last.device), padded.last] = True
        for block in range(blocks):
            with skipping(lm, range(block + 1, blocks)):
                states = hidden_of(lm, last, lambda: lm.model(**padded.inputs, use_cache=False))
            found = logits_of(lm, states).float().log_softmax(-1).cpu()
            own = found.gather(1, wanted[list(part), None])
            log_p[block, list(part)] = own[:, 0]
            rank[block, list(part)] = (found > own).sum(-1)

    halving(by_length([len(p.ids) for p in prompts], 2048), run, lambda _: None)
    return Lens(log_p, rank)
