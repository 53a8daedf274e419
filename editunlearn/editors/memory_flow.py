"""The flow of methods that keep a memory beside one layer: rows of the facts, prompts to keep, the method's fit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from editunlearn.editors import contexts, located
from editunlearn.facts.text import documents
from editunlearn.hparams import MemoryHParams
from editunlearn.hparams.training import PASSAGE
from editunlearn.lm.attention import short_rows
from editunlearn.lm.hooks import frozen
from editunlearn.lm.tokens import Row
from editunlearn.lm.windows import windows

if TYPE_CHECKING:
    from types import ModuleType

    from editunlearn.console import Console
    from editunlearn.deltas.remembering import Memory
    from editunlearn.facts.records import Fact, ForgetRequest
    from editunlearn.hparams import BlockHParams
    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace

H = TypeVar("H", bound=MemoryHParams)


@dataclass(frozen=True)
class Fitted:
    """A memory, and for each of its entries the ids of the facts that it serves."""

    memory: Memory
    entries: list[tuple[str, ...]]


@dataclass(frozen=True)
class Stage(Generic[H]):
    """What a method's fit gets.

    Attributes:
        site: the map that the memory is put beside.
        facts: to forget.
        rows: for each fact its rows with the target, the bare prompt first; ``lookup`` is the prompt's last token.
        keep: prompts to keep.
        texts: passages of general text, which are longer than any prompt, to keep.
    """

    lm: LM
    hp: H
    site: Site
    facts: Sequence[Fact]
    rows: list[list[Row]]
    keep: list[Row]
    texts: list[Row]
    work: Workspace
    console: Console


def run(
    lm: LM,
    request: ForgetRequest,
    hp: MemoryHParams,
    method: ModuleType,
    work: Workspace,
    cache: Path | None,
    console: Console,
) -> tuple[str, Fitted]:
    """The module's name and its memory.

    Raises:
        InputError: a layer that the model does not have, no facts, facts without target.
        NumericalError: a loss that is not finite.
    """
    site = lm.layout.site(located.blocks(lm, request, hp, method, console)[0])
    with frozen(lm.model), short_rows(lm.device):
        prefixes = contexts.prefixes(lm, hp.context_prefixes, cache)
        rows = contexts.forget_rows(lm, request.facts, prefixes, hp).targets
        keep, texts = prompts_to_keep(lm, request, hp), texts_to_keep(lm, hp)
        stage = Stage(lm, hp, site, request.facts, rows, keep, texts, work, console)
        found: Fitted = method.fit(stage)
    return site.name, found


def texts_to_keep(lm: LM, hp: MemoryHParams | BlockHParams) -> list[Row]:
    """``hp.texts`` passages of the shipped general text."""
    passages = windows(lm, documents("general"), PASSAGE, PASSAGE * hp.texts) if hp.texts else []
    return [Row(tuple(ids), 0, len(ids)) for ids in passages]


def prompts_to_keep(lm: LM, request: ForgetRequest, hp: MemoryHParams | BlockHParams) -> list[Row]:
    """At most ``hp.keep`` prompts: all that the user retains, those of earlier memories, then in equal parts shipped
    ones and those of the forgotten facts about others, which are the closest that there are."""
    earlier = contexts.earlier_rows(lm, request.earlier, hp, targets=False)
    kept = [*contexts.keep_rows(lm, request.retain, hp, answers=False), *earlier][: hp.keep]
    shipped = [*request.general, *request.names]
    random.Random(hp.seed).shuffle(shipped)
    room = hp.keep - len(kept)
    names = contexts.other_names(lm, request.facts, [*request.retain, *shipped], hp)
    swapped = contexts.swapped_rows(lm, request.facts, names, room if not shipped else room // 2, hp)
    swapped = [contexts.prompt_alone(row) for row in swapped]
    return [*kept, *contexts.keep_rows(lm, shipped[: room - len(swapped)], hp, answers=False), *swapped]
