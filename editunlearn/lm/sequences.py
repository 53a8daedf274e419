"""What a pass of the model runs: where each row's prompt ends, and which sequence a step of decoding goes on with.

A change that depends on the prompt must be decided where the prompt ends, once a row, and kept while the answer is
decoded. A module inside the model sees none of that: of a padded batch only states, of a decoding step only one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from editunlearn.errors import UnsupportedError

if TYPE_CHECKING:
    from editunlearn.lm.tokens import Batch

_ENDS = "_prompt_ends"


def forward(model: nn.Module, padded: Batch) -> Any:
    """One pass over whole rows, prompt and target, of which the model's watchers know where the prompt ends."""
    model.__dict__[_ENDS] = padded.last
    try:
        return model(**padded.inputs, use_cache=False)
    finally:
        model.__dict__.pop(_ENDS, None)


@dataclass
class Piece:
    """The tokens of one pass.

    Attributes:
        mask: (rows, length) bool, False for padding.
        ends: (rows,) index of the prompt's last token; of the last token there is where nobody said.
        decoding: a single token behind others: part of an answer, no prompt ends here.
        kept: what was decided of these sequences, by whoever decided it; it stays with their cache.
    """

    mask: Tensor
    ends: Tensor
    decoding: bool
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prompt(self) -> Tensor:
        """(rows, length) bool: tokens up to the end of the prompt."""
        index = torch.arange(self.mask.shape[1], device=self.mask.device)
        return self.mask & (index <= self.ends[:, None])

    def rows(self, states: Tensor) -> Tensor:
        """States of a module, flattened or not, as (rows, length, width)."""
        return states.reshape(*self.mask.shape, states.shape[-1])


class Watcher:
    """Follows the passes of one model.

    Attributes:
        piece: of the pass that is running, or of the last one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = list(inspect.signature(model.forward).parameters)
        self.piece = Piece(torch.ones(0, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.long), False)
        self._kept: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()

    def before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See what the model is called with."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        tokens: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        cache = given.get("past_key_values")
        earlier = int(cache.get_seq_length()) if cache is not None else 0
        mask = _mask(given.get("attention_mask"), tokens)
        ends = self.model.__dict__.get(_ENDS)
        if ends is None:
            ends = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        kept: dict[str, Tensor] = {}
        if earlier:
            # several tokens behind others are a further piece of the prompt, or the next turn: decided anew
            kept = self._known(cache, mask.shape[0])
        elif cache is not None:
            self._kept[cache] = kept
        self.piece = Piece(mask, ends.to(mask.device), bool(earlier) and mask.shape[1] == 1, kept)

    def after(self, _model: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        """Remember the decisions with the cache that the model made by itself."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._kept[cache] = self.piece.kept

    def _known(self, cache: Any, rows: int) -> dict[str, Tensor]:
        kept = self._kept.get(cache)
        if kept is None:
            raise UnsupportedError(
                "the key-value cache was filled before the delta was applied, or is a copy: what was decided at the "
                "end of the prompt is not known. Run the prompt inside of applied(), and go on with that very cache."
            )
        if any(len(value) != rows for value in kept.values()):
            raise UnsupportedError(
                "rows were taken out of the key-value cache, or repeated, while decoding; repeat the prompts instead."
            )
        return kept


def _mask(given: Any, tokens: Tensor) -> Tensor:
    """(rows, length) bool of the tokens that are run now."""
    rows, length = tokens.shape[:2]
    if given is None:
        return torch.ones(rows, length, dtype=torch.bool, device=tokens.device)
    if not isinstance(given, Tensor) or given.dim() != 2:
        raise UnsupportedError(
            "a memory needs the plain attention mask (rows, tokens), to see padding; this pass has another one. "
            "Decode with the default dynamic cache."
        )
    return given[:, -length:].bool()


@contextmanager
def watched(model: nn.Module) -> Iterator[Watcher]:
    """Follow every pass of ``model`` inside."""
    watcher = Watcher(model)
    handles = [
        model.register_forward_pre_hook(watcher.before, with_kwargs=True),
        model.register_forward_hook(watcher.after, with_kwargs=True),
    ]
    try:
        yield watcher
    finally:
        for handle in handles:
            handle.remove()
