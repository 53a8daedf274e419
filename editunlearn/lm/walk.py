"""Rows that go up the blocks step by step, while the blocks below the last step may be edited no more.

An editor reads keys at one block after the other, each on the model as the edits below have left it. The states that
enter the block where it stands are kept, so that no block is run again but that one, and what rows begin with alike is
run once. Everything goes through the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.beginnings import Beginnings
from editunlearn.lm.blocks import from_block, returned, states_of
from editunlearn.lm.hooks import StopForward, on_input, on_output, stack
from editunlearn.lm.resume import started
from editunlearn.lm.tokens import Row, batch, until_lookup

if TYPE_CHECKING:
    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM

Pair = tuple[Tensor, Tensor]
"""Keys and values of one block, (rows, heads, tokens, width) each."""


class Walk:
    """Rows up to their lookup tokens, on the way through the blocks.

    Args:
        rows: what stands behind a row's lookup token is not run.
        warn: called with a sentence when a batch does not fit and is halved.
    """

    def __init__(self, lm: LM, rows: Sequence[Row], warn: Callable[[str], None] = lambda _: None) -> None:
        self.lm, self.warn = lm, warn
        cut = [until_lookup(row).ids for row in rows]
        self.begun = Beginnings.find(cut, lm.pad_id, lm.device)
        self.mask = self.begun.mask(lm.device)
        self.own = [ids[start:] for ids, start in zip(cut, self.begun.lengths, strict=True)]
        self.returned = returned(lm)
        self.at = 0
        self.entering: list[Tensor] = []  # of each row what enters block ``at``, (own tokens, width); none at the start
        self.beginning: Tensor | None = None  # the same of the beginnings, padded

    def keys(self, site: Site) -> Tensor:
        """Input of ``site`` at the lookup tokens, (rows, d_in) float32 on the CPU; the walk then stands at its block.

        Raises:
            ValueError: the walk has gone further already.
        """
        if site.layer < self.at:
            raise ValueError(f"the walk stands at block {self.at}, {site.name} is below")
        return self._run(range(len(self.own)), [site.name], site.layer, inputs=True)[site.name]

    def outputs(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of modules at or above the block where the walk stands, at the lookup tokens of some rows.

        The module that is named first must be the last to run; the pass stops there.

        Returns:
            name -> (len(rows), width) float32 on the CPU.
        """
        return self._run(rows, names, None, inputs=False)

    @torch.no_grad()
    def _run(self, rows: Sequence[int], names: Sequence[str], until: int | None, *, inputs: bool) -> dict[str, Tensor]:
        """What goes in or out of some modules; moves to block ``until`` if there is one."""
        found: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        entered: dict[int, Tensor] = {}
        alone = not any(self.begun.lengths[row] for row in rows)
        past, beginning = ([], None) if alone else self._beginnings(names[0], until, inputs=inputs)

        def run(part: Sequence[int]) -> None:
            def see(name: str, states: Tensor) -> None:
                flat = states.reshape(len(part), -1, states.shape[-1])
                ends = torch.tensor([len(self.own[row]) - 1 for row in part], device=flat.device)
                last = flat[torch.arange(len(part), device=flat.device), ends]
                found[name] |= dict(zip(part, last.float().cpu(), strict=True))
                if name == names[0]:
                    raise StopForward

            hooks = [self._reading(name, lambda s, n=name: see(n, s), inputs=inputs) for name in names]  # type: ignore[misc]
            entering: list[Tensor] = []
            with stack(hooks), self._entered(until, entering):
                self._pass(part, past)
            for row, states in zip(part, entering[0] if entering else (), strict=False):
                entered[row] = states[: len(self.own[row])].clone()

        halving([[rows[i] for i in part] for part in by_length([len(self.own[r]) for r in rows])], run, self.warn)
        if until is not None:
            self.at, self.beginning = until, beginning
            self.entering = [entered[row] for row in range(len(self.own))]
        return {name: torch.stack([of_row[row] for row in rows]) for name, of_row in found.items()}

    def _pass(self, part: Sequence[int], past: Sequence[Pair | None]) -> None:
        """Some rows from block ``at`` on, up to where a hook stops it."""
        device = self.lm.device
        own = batch([Row(self.own[row], 0, 1) for row in part], self.lm.pad_id, device)
        before = self.begun.width if past else 0
        mask = torch.cat([self.mask[list(part), :before], own.attention_mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
        states = pad_sequence([self.entering[r] for r in part], batch_first=True) if self.entering else None
        of = self.begun.of[list(part)]
        cache = started(self.lm, [None if kv is None else (kv[0][of], kv[1][of]) for kv in past]) if past else None
        inputs = {"input_ids": own.input_ids, "attention_mask": mask, "position_ids": positions}
        with self._from(states), suppress(StopForward):
            self.lm.model(**inputs, past_key_values=cache, use_cache=cache is not None)

    def _beginnings(self, last: str, until: int | None, *, inputs: bool) -> tuple[list[Pair | None], Tensor | None]:
        """By block the keys and values of the beginnings where they were run, and what of them enters ``until``."""
        assert self.begun.padded is not None  # noqa: S101 - a row has a beginning

        def stop(_states: Tensor) -> None:
            raise StopForward

        cache = started(self.lm, [])
        entering: list[Tensor] = []
        with (
            self._reading(last, stop, inputs=inputs),
            self._entered(until, entering),
            self._from(self.beginning),
            suppress(StopForward),
        ):
            self.lm.model(**self.begun.padded.inputs, past_key_values=cache, use_cache=True)
        past = [(layer.keys, layer.values) if layer.keys is not None else None for layer in cache.layers]
        if all(pair is None for pair in past) or any(p and p[0].shape[-2] != self.begun.width for p in past):
            raise ValueError("its key-value cache does not hold all tokens of a row (a short attention window?)")
        return past, entering[0] if entering else None

    def _from(self, states: Tensor | None) -> AbstractContextManager[None]:
        """The pass begins at block ``at`` with ``states``, or where every pass begins."""
        return nullcontext() if states is None else from_block(self.lm, self.at, states, self.returned)

    def _reading(self, name: str, see: Callable[[Tensor], None], *, inputs: bool) -> AbstractContextManager[None]:
        module = self.lm.layout.module(self.lm.model, name)
        return on_input(module, see) if inputs else on_output(module, lambda _inputs, output: see(output))

    @contextmanager
    def _entered(self, block: int | None, seen: list[Tensor]) -> Iterator[None]:
        """Collect what enters a block."""
        if block is None:
            yield
            return
        module = self.lm.layout.module(self.lm.model, self.lm.layout.block_name(block))
        handle = module.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append(states_of(args, kwargs)), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()
