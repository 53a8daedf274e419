"""Batches sized by the memory that is free: what ``batch_tokens: auto`` stands for.

On a CPU it is a fixed number where there is room for it: from 512 tokens on, values of 100 facts take the same time in
batches of any size (8.0 s at 512, 2,048 and 16,384 tokens in a model of 30M parameters), and less memory in small ones.
A GPU is faster the more it gets at once. The numbers are powers of two, so that a little more or less of free memory
does not make another run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from editunlearn.hparams import EditorHParams, MethodHParams
from editunlearn.hparams.pieces import BATCH_TOKENS, REFINE_BATCH_TOKENS
from editunlearn.lm.free import free_memory
from editunlearn.lm.kept import HOLES, at_most, kept_by_autograd

if TYPE_CHECKING:
    from torch import nn

    from editunlearn.console import Console
    from editunlearn.lm.layout import Layout
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace

Settings = TypeVar("Settings", bound=MethodHParams)

SHARE = 1 / 3
"""Of the free memory, for what autograd keeps of a batch: the rest is for all that a run holds beside it."""
SPARED = 0.2
"""Of the size of the model, for the same where as little as can be is to be beside it (``LM.offload``)."""
LEAST, MOST = 256, 16_384
"""Tokens of a batch: fewer save little memory, and more do not make a GPU any faster."""
IN_REFINE = "refine.batch_tokens"
PIECE = "batches"
"""Name of the numbers in a workspace: an interrupted run goes on with the batches that it began with."""


@dataclass(frozen=True)
class Room:
    """What there is to divide among the tokens of a batch.

    Attributes:
        share: bytes; None where the system does not say.
        grows: whether a larger batch is faster here.
        ample: more bytes than a token takes.
        kept: (number of the first block that gradients go back to) -> bytes that are kept of a token.
    """

    share: float | None
    grows: bool
    ample: float
    kept: Callable[[int], float]

    def tokens(self, usual: int, first: int) -> int:
        """Of a batch, ``usual`` where there is no reason for another number."""
        if self.share is None:
            return usual
        most = MOST if self.grows else usual
        if self.share >= HOLES * most * self.ample:  # counting takes as long as a batch of a small model
            return most
        fits = max(LEAST, int(self.share / (HOLES * self.kept(first))))
        return min(most, 1 << (fits.bit_length() - 1))


def open_numbers(hp: MethodHParams, layers: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Which numbers of tokens are ``auto``: by name the usual one, and the first block that gradients go back to.

    Args:
        layers: numbers of the blocks that are changed.
    """
    found: dict[str, tuple[int, int]] = {}
    if hp.batch_tokens == "auto":
        found["batch_tokens"] = BATCH_TOKENS, values_from(hp, layers)
    if isinstance(hp, EditorHParams) and hp.refine is not None and hp.refine.batch_tokens == "auto":
        found[IN_REFINE] = REFINE_BATCH_TOKENS, min(layers)
    return found


def values_from(hp: MethodHParams, layers: Sequence[int]) -> int:
    """The first block that the gradients of values, or of what is trained, go back to."""
    at_the_last = isinstance(hp, EditorHParams) and hp.value.spread == "residual"
    return max(layers) if at_the_last else min(layers)


def with_numbers(hp: Settings, numbers: Mapping[str, int]) -> Settings:
    """``hp`` with numbers in place of those that :func:`open_numbers` names."""
    new: dict[str, object] = {name: number for name, number in numbers.items() if name != IN_REFINE}
    if isinstance(hp, EditorHParams) and hp.refine is not None and IN_REFINE in numbers:
        new["refine"] = hp.refine.model_copy(update={"batch_tokens": numbers[IN_REFINE]})
    return hp.model_copy(update=new)


def settled(
    lm: LM,
    hp: Settings,
    layers: Sequence[int],
    work: Workspace,
    console: Console,
    *,
    trained: Sequence[str] = (),
    held: float = 0.0,
) -> Settings:
    """``hp`` with numbers in place of ``batch_tokens: auto``: the interrupted run's, or by what is free now.

    Processes (``lm.among``) have the same batches, those of the first.

    Args:
        layers: numbers of the blocks that are changed.
        trained: linear maps whose weights get gradients, by name.
        held: bytes that the method takes beside its batches.
    """
    asked = open_numbers(hp, layers)

    def found() -> dict[str, int]:
        usual = {name: number for name, (number, _) in asked.items()}
        if work.folder is not None and work.folder.exists():  # where nothing else is said, it was these
            return usual | {name: int(number) for name, number in (work.get(PIECE) or {}).items()}
        room = of_model(lm, trained, held)
        numbers = {name: room.tokens(*how) for name, how in asked.items()}
        if numbers != usual:
            work.put(PIECE, {name: torch.tensor(number) for name, number in numbers.items()})
        return numbers

    numbers = lm.among.by_first(found) if asked else {}
    for name, number in numbers.items():
        console.detail(f"{name}: {number:,} (auto)")
    return with_numbers(hp, numbers)


def of_model(lm: LM, trained: Sequence[str] = (), held: float = 0.0) -> Room:
    """The room beside a model that is there."""
    devices = {p.device for p in lm.model.parameters() if not p.is_meta} or {lm.device}
    places = [d for d in devices if d.type != "cpu"] or [torch.device("cpu")]
    free = [free_memory(device) for device in places]
    least = min((f for f in free if f is not None), default=None)
    dtype = str(lm.dtype).removeprefix("torch.")
    return room_of(
        lm.model,
        lm.layout,
        lm.model.config,
        dtype,
        places[0].type,
        least,
        trained=trained,
        held=held,
        offload=lm.offload,
    )


def room_of(
    model: nn.Module,
    layout: Layout,
    config: Any,
    dtype: str,
    device: str,
    free: float | None,
    *,
    trained: Sequence[str] = (),
    held: float = 0.0,
    offload: bool = False,
) -> Room:
    """The room that a model, which may be on the meta device, leaves in so many free bytes.

    Args:
        dtype: that it computes in.
        device: cpu, cuda, ...
        trained, held: as for :func:`settled`.
        offload: as of the ``LM``.
    """
    width = getattr(torch, dtype).itemsize
    ample = at_most(model, layout, width)
    shares = [] if free is None else [SHARE * max(0.0, free - held)]
    if offload:
        shares.append(SPARED * width * sum(p.numel() for p in model.parameters()))

    def kept(first: int) -> float:
        try:
            return kept_by_autograd(config, dtype, first, trained)
        except Exception:  # noqa: BLE001 - code of a model that does not run on fake tensors
            return ample

    return Room(min(shares, default=None), device != "cpu", ample, kept)
