"""Registry of the closed-form editors: method name -> module, imported only when used.

An editor is one file here with ``class HParams(EditorHParams)`` (its schema and defaults) and ``fit``, plus
one row in ``METHODS`` and one file ``hparams/<method>.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.naming import did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    from editunlearn.console import Console
    from editunlearn.deltas.lowrank import LowRankDelta
    from editunlearn.editors.past import PastKeys
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.hparams import EditorHParams
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "rome": "editunlearn.editors.rome",
        "r_rome": "editunlearn.editors.r_rome",
        "memit": "editunlearn.editors.memit",
        "emmet": "editunlearn.editors.emmet",
        "alphaedit": "editunlearn.editors.alphaedit",
    }
)


def names() -> list[str]:
    """Names of all methods, in the order in which help and tables show them."""
    return list(METHODS)


def module(method: str) -> ModuleType:
    """The module of a method, imported now.

    Raises:
        InputError: no such method; the message lists the known ones.
    """
    if not isinstance(method, str) or method not in METHODS:
        hint = did_you_mean(method, METHODS) if isinstance(method, str) else ""
        raise InputError(f"unknown method {method!r}.{hint} Methods: {', '.join(METHODS)}.")
    return import_module(METHODS[method])


def schema(method: str) -> type[EditorHParams]:
    """The hparams class of a method; importing it does not import torch.

    Raises:
        InputError: no such method; the message lists the known ones.
    """
    found: type[EditorHParams] = module(method).HParams
    return found


def fit(
    lm: LM,
    request: ForgetRequest,
    hp: EditorHParams,
    *,
    past: PastKeys | None = None,
    work: Workspace | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    store_facts: bool = False,
    target_strategy: str = "given",
) -> LowRankDelta:
    """The change that makes the model say each fact's target; the model itself is not changed.

    Args:
        request: facts with targets, and facts to keep.
        past: keys of earlier edits, which are then preserved too (``run`` also returns the extended ones).
        work: keeps finished stages of this run. None: an interrupted run starts over.
        cache: folder for second moments and context prefixes; None measures them anew.
        store_facts: keep the facts' text in the manifest.
        target_strategy: how the targets were made, for the manifest.

    Raises:
        InputError: layers that the model does not have, facts without target, and the like.
        NumericalError: a loss or factor that is not finite, or a system without a solution.
    """
    return run(
        lm,
        request,
        hp,
        past=past,
        work=work,
        cache=cache,
        console=console,
        store_facts=store_facts,
        target_strategy=target_strategy,
    )[0]


def run(
    lm: LM,
    request: ForgetRequest,
    hp: EditorHParams,
    *,
    past: PastKeys | None = None,
    work: Workspace | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    store_facts: bool = False,
    target_strategy: str = "given",
) -> tuple[LowRankDelta, PastKeys]:
    """Like :func:`fit`, with the past keys that a next edit needs."""
    from editunlearn.console import Console
    from editunlearn.deltas.build import make_delta
    from editunlearn.deltas.lowrank import Factors
    from editunlearn.editors.flow import Flow
    from editunlearn.editors.past import PastKeys
    from editunlearn.hparams import resolved
    from editunlearn.workspace import Workspace

    console, work = console or Console(quiet=True), work or Workspace(None, {})
    found = Flow(lm, request, hp, module(hp.method), past or PastKeys(), work, cache, console).run()
    delta = make_delta(
        lm,
        {name: Factors(left, right) for name, (left, right) in found.factors.items()},
        method=hp.method,
        hparams=resolved(hp),
        facts=request.facts,
        columns=found.columns,
        target_strategy=target_strategy,
        seeds={"seed": hp.seed},
        retain=request.retain,
        past=past.digest() if past is not None else "",
        store_facts=store_facts,
    )
    return delta, found.past
