"""Run only what an edit can change: the blocks from the first edited one and, of an edit at one token, the tokens from
that one on.

A change of a block's output at the lookup token leaves the blocks below as they were, and, attention being causal, all
tokens before it. Both are computed once: the keys and values of the earlier tokens, and the hidden states that enter
the first edited block. What remains goes through the model's own code with a key-value cache, so that nothing about an
architecture is written down here; where a model does not fit this way, :func:`resumable` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from editunlearn.lm.beginnings import Beginnings
from editunlearn.lm.blocks import blocks_of, from_block, states_of
from editunlearn.lm.head import before_head, hidden_of
from editunlearn.lm.sequences import forward
from editunlearn.lm.tokens import Batch, Row, batch

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""How far the two ways may be apart, relative to the spread of the last states: they round differently."""


class Pass(Protocol):
    """Rows that are run again and again with something changed at their lookup tokens."""

    @property
    def padded(self) -> Batch:
        """The tokens that are run."""

    def pick(self, rows: Sequence[int]) -> Pass:
        """Some of the rows."""

    def hidden(self, scored: Tensor) -> Tensor:
        """States before the head (number scored, width) at the ``scored`` positions of ``padded``, with all hooks at
        work."""


class Whole:
    """The plain way: all tokens through all blocks."""

    def __init__(self, lm: LM, rows: Sequence[Row]) -> None:
        self.lm, self.rows = lm, rows
        self.padded = batch(rows, lm.pad_id, lm.device)

    def pick(self, rows: Sequence[int]) -> Whole:
        """Some of the rows."""
        return Whole(self.lm, [self.rows[i] for i in rows])

    def hidden(self, scored: Tensor) -> Tensor:
        """See :class:`Pass`."""
        return hidden_of(self.lm, scored, lambda: forward(self.lm.model, self.padded))


@dataclass(frozen=True)
class Tail:
    """Rows of which the tokens before the lookup token, and the blocks below ``first``, have been run.

    Attributes:
        first: number of the first block that is run again.
        padded: the tokens from the lookup token on.
        mask: (rows, earlier tokens + length of ``padded``) attention mask; earlier tokens are padded on the left.
        past: for each block the keys and values of the earlier tokens.
        entering: (rows, length of ``padded``, width) input of block ``first``.
        outputs: how many things a block returns; 0: the hidden states themselves.
    """

    lm: LM
    first: int
    padded: Batch
    mask: Tensor
    past: list[tuple[Tensor, Tensor]]
    entering: Tensor
    outputs: int

    @classmethod
    def of(cls, lm: LM, rows: Sequence[Row], first: int, *, share: bool = True) -> Tail:
        """Run the rows once, all tokens through all blocks; what several begin with only once if ``share``.

        Raises:
            ValueError: these rows cannot be resumed: no token before the lookup token, or an attention window shorter
                than the rows.
        """
        begun = Beginnings.alone(len(rows))
        if share:
            begun = Beginnings.find([row.ids[: row.lookup + 1] for row in rows], lm.pad_id, lm.device)
        earlier = [row.ids[start : row.lookup] for row, start in zip(rows, begun.lengths, strict=True)]
        ids, mask = left_padded(earlier, lm.pad_id)
        before = begun.width + ids.shape[1]
        if before == 0:
            raise ValueError("nothing stands before the subjects")
        later = [Row(row.ids[row.lookup :], 0, row.prompt_length - row.lookup) for row in rows]
        padded = batch(later, lm.pad_id, lm.device)
        mask = torch.cat([begun.mask(lm.device), mask.to(lm.device), padded.attention_mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = replace(padded, position_ids=positions[:, before:])
        ids = torch.cat([ids.to(lm.device), padded.input_ids], 1)
        past, hidden, outputs = _run_once(lm, ids, mask, positions, before, first, _begun(lm, begun))
        return cls(lm, first, padded, mask, past, hidden, outputs)

    def pick(self, rows: Sequence[int]) -> Tail:
        """Some of the rows, as wide as before."""
        padded, past = _padded(self.padded, rows), [(_some(k, rows), _some(v, rows)) for k, v in self.past]
        return replace(self, padded=padded, mask=_some(self.mask, rows), past=past, entering=_some(self.entering, rows))

    def hidden(self, scored: Tensor) -> Tensor:
        """See :class:`Pass`."""
        inputs = {
            "input_ids": self.padded.input_ids,
            "attention_mask": self.mask,
            "position_ids": self.padded.position_ids,
            "past_key_values": started(self.lm, self.past),
        }
        with from_block(self.lm, self.first, self.entering, self.outputs):
            return hidden_of(self.lm, scored, lambda: self.lm.model(**inputs, use_cache=True))


def _some(value: Tensor, rows: Sequence[int]) -> Tensor:
    return value[torch.tensor(rows, dtype=torch.long, device=value.device)]


def _padded(old: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, in their order and as wide as before."""
    index = torch.tensor(rows, dtype=torch.long, device=old.owners.device)
    wanted = torch.isin(old.owners, index)
    number = torch.full((len(old.input_ids),), -1, device=old.owners.device)
    number[index] = torch.arange(len(index), device=number.device)
    per_row = {
        name: _some(getattr(old, name), rows)
        for name in ("input_ids", "attention_mask", "position_ids", "lookup", "targets", "last")
    }
    return Batch(**per_row, labels=old.labels[wanted], owners=number[old.owners[wanted]])


@dataclass(frozen=True)
class Upper:
    """Rows of which the blocks below ``first`` have been run; all tokens are run again, for a change at all of them.

    Attributes:
        entering: (rows, length, width) input of block ``first``.
        outputs: how many things a block returns; 0: the hidden states themselves.
    """

    lm: LM
    first: int
    padded: Batch
    entering: Tensor
    outputs: int

    @classmethod
    def of(cls, lm: LM, rows: Sequence[Row], first: int) -> Upper:
        """Run the rows once."""
        padded = batch(rows, lm.pad_id, lm.device)
        _, hidden, outputs = _entering(lm, first, padded.input_ids, lambda: forward(lm.model, padded))
        return cls(lm, first, padded, hidden.clone(), outputs)

    def pick(self, rows: Sequence[int]) -> Upper:
        """Some of the rows, as wide as before."""
        return replace(self, padded=_padded(self.padded, rows), entering=_some(self.entering, rows))

    def hidden(self, scored: Tensor) -> Tensor:
        """See :class:`Pass`."""
        with from_block(self.lm, self.first, self.entering, self.outputs):
            return hidden_of(self.lm, scored, lambda: forward(self.lm.model, self.padded))


@torch.no_grad()
def _entering(lm: LM, first: int, ids: Tensor, run: Callable[[], Any]) -> tuple[Any, Tensor, int]:
    """What a pass over ``ids`` without the head gives, the states that enter a block, and how much a block returns."""
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    nothing[0, 0] = True
    seen: list[Any] = []
    handle = blocks_of(lm)[first].register_forward_hook(
        lambda _module, args, kwargs, output: seen.append((states_of(args, kwargs), output)), with_kwargs=True
    )
    try:
        with before_head(lm.head, nothing):
            out = run()
    finally:
        handle.remove()
    hidden, output = seen[0]
    return out, hidden, len(output) if isinstance(output, tuple) else 0


def _run_once(
    lm: LM,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    before: int,
    first: int,
    begun: Sequence[tuple[Tensor, Tensor]],
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, int]:
    """Keys and values of the first ``before`` tokens, the later tokens' input of a block, and what blocks return.

    ``mask`` and ``positions`` are of all tokens, ``ids`` without those that ``begun`` holds the keys and values of.
    """
    start = mask.shape[1] - ids.shape[1]
    cache = started(lm, begun)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions[:, start:]}
    out, hidden, outputs = _entering(lm, first, ids, lambda: lm.model(**inputs, past_key_values=cache, use_cache=True))
    return _kept(out, mask.shape[1], before), hidden[:, before - start :].clone(), outputs


def _kept(out: Any, length: int, before: int) -> list[tuple[Tensor, Tensor]]:
    """For each block the keys and values of the first ``before`` tokens of a pass that had ``length``."""
    layers = out.past_key_values.layers
    if any(layer.keys is None or layer.keys.shape[-2] != length for layer in layers):
        raise ValueError("its key-value cache does not hold all tokens of a row (a short attention window?)")
    return [(layer.keys[..., :before, :].clone(), layer.values[..., :before, :].clone()) for layer in layers]


def _begun(lm: LM, begun: Beginnings) -> list[tuple[Tensor, Tensor]]:
    """For each block the keys and values of each row's beginning; none if nothing is shared."""
    if begun.padded is None:
        return []
    inputs = begun.padded.inputs
    out, _, _ = _entering(lm, 0, inputs["input_ids"], lambda: lm.model(**inputs, use_cache=True))
    past = _kept(out, begun.width, begun.width)
    return [(k[begun.of.to(k.device)], v[begun.of.to(v.device)]) for k, v in past]


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids of rows that may be empty, padded on the left, and their attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids.reshape(len(rows), width), mask.reshape(len(rows), width)


def started(lm: LM, past: Sequence[tuple[Tensor, Tensor] | None]) -> Any:
    """A fresh cache that begins with ``past``, which is left as it is.

    Blocks without anything, which must not be run, get zeros: their length decides over the attention mask.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=lm.model.config)
    there = next((pair for pair in past if pair is not None), None)
    if there is None:
        return cache
    for number, pair in enumerate(past):
        keys, values = pair if pair is not None else map(torch.zeros_like, there)
        cache.update(keys, values, number)
    return cache


@torch.no_grad()
def resumable(lm: LM, row: Row, first: int, way: type[Tail] | type[Upper] = Tail) -> str:
    """ "" when resuming ``row`` at block ``first`` ends like a whole pass, else why it does not."""
    try:
        part = way.of(lm, [row], first)
        resumed = part.hidden(part.padded.targets)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model's code does not like, the plain way remains
        return str(error) or type(error).__name__
    whole = Whole(lm, [row])
    plain = whole.hidden(whole.padded.targets)
    apart = float((resumed.float() - plain.float()).square().mean().sqrt() / plain.float().std().clamp(min=1e-30))
    return "" if apart <= CLOSE.get(plain.dtype, 1e-3) else f"its last states differ by {apart:.2g} of their spread"
