"""Registry of the editors: method name -> module, imported only when used.

An editor is one file here with its schema and defaults: ``class HParams(EditorHParams)`` and ``solve`` for a change of
weights, ``class HParams(MemoryHParams)`` and ``fit`` for a memory, ``class HParams(BlockHParams)`` for one that trains
a block. It has one row in ``METHODS`` and one file
``hparams/<method>.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from editunlearn.errors import InputError
from editunlearn.naming import did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.editors.earlier import Earlier
    from editunlearn.editors.past import PastKeys
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.hparams import MethodHParams
    from editunlearn.lm.layout import Layout, Site
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "rome": "editunlearn.editors.rome",
        "r_rome": "editunlearn.editors.r_rome",
        "memit": "editunlearn.editors.memit",
        "emmet": "editunlearn.editors.emmet",
        "alphaedit": "editunlearn.editors.alphaedit",
        "grace": "editunlearn.editors.grace",
        "wise": "editunlearn.editors.wise",
        "unke": "editunlearn.editors.unke",
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


def schema(method: str) -> type[MethodHParams]:
    """The hparams class of a method; importing it does not import torch.

    Raises:
        InputError: no such method; the message lists the known ones.
    """
    found: type[MethodHParams] = module(method).HParams
    return found


def fit(lm: LM, request: ForgetRequest, hp: MethodHParams, **options: Any) -> Delta:
    """The change that makes the model say each fact's target; the model itself is not changed.

    Args:
        options: as for :func:`run`.
    """
    return run(lm, request, hp, **options)[0]


def run(
    lm: LM,
    request: ForgetRequest,
    hp: MethodHParams,
    *,
    past: PastKeys | None = None,
    earlier: Earlier | None = None,
    work: Workspace | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    store_facts: bool = False,
    target_strategy: str = "counterfactual",
) -> tuple[Delta, PastKeys]:
    """Like :func:`fit`, with the past keys that a next edit needs.

    Args:
        request: facts with targets, and facts to keep.
        past: keys of earlier edits, which are then preserved too.
        earlier: edits to go on from; the result holds them too. They bring their own past keys.
        work: keeps finished stages of this run. None: an interrupted run starts over.
        cache: folder for second moments and context prefixes; None measures them anew.
        store_facts: keep the facts' text in the manifest.
        target_strategy: how the targets were made, for the manifest.

    Raises:
        InputError: layers that the model does not have, facts without target, and the like.
        NumericalError: a loss or factor that is not finite, or a system without a solution.
    """
    from editunlearn.console import Console
    from editunlearn.deltas.build import check_norm, make_delta, what_was_asked, with_gain
    from editunlearn.deltas.kinds import compose
    from editunlearn.editors import located
    from editunlearn.editors.past import PastKeys
    from editunlearn.hparams import BlockHParams, EditorHParams, MemoryHParams
    from editunlearn.lm import room
    from editunlearn.workspace import Workspace

    hp, _ = located.settled(lm, hp, cache, module(hp.method).DEFAULT_LAYERS)
    console, work, past = console or Console(quiet=True), work or Workspace(None, {}), past or PastKeys()
    if earlier is not None:
        if past.keys:
            raise InputError("past keys and earlier edits were both given; the latter bring their own keys.")
        earlier.check_model(lm)
        earlier.check_method(hp, _sites(lm, hp))
        past = earlier.past
    hp = room.settled(lm, hp, [lm.layout.layer_of(name) for name in _sites(lm, hp)], work, console)
    about = what_was_asked(request, hp, target_strategy, store_facts=store_facts)
    if isinstance(hp, MemoryHParams):
        from editunlearn.deltas.memory import make_memory
        from editunlearn.editors import memory_flow

        check_past(hp, past)
        name, made = memory_flow.run(lm, request, hp, module(hp.method), work, cache, console)
        remembered = make_memory(lm, {name: made.memory}, entries={name: made.entries}, **about)
        return compose(earlier.delta, remembered) if earlier is not None else remembered, past
    if isinstance(hp, BlockHParams):
        from editunlearn.deltas.dense import DenseDelta, make_dense
        from editunlearn.editors import block_flow

        check_past(hp, past)
        changes = block_flow.run(lm, request, hp, module(hp.method), work, cache, console, earlier)
        trained: Delta = make_dense(lm, changes, **about)
        if earlier is not None:
            trained = compose(earlier.delta, trained)
        assert isinstance(trained, DenseDelta)  # noqa: S101 - check_method saw to it
        check_norm(trained, hp.limits.norm)
        return trained if earlier is None else with_gain(lm, trained), past
    assert isinstance(hp, EditorHParams)  # noqa: S101 - there are these three
    from editunlearn.deltas.lowrank import Factors, LowRankDelta
    from editunlearn.editors.flow import Flow

    found = Flow(lm, request, hp, module(hp.method), past, work, cache, console, earlier).run()
    delta: Delta = make_delta(
        lm,
        {name: Factors(left, right) for name, (left, right) in found.factors.items()},
        columns=found.columns,
        past=past.digest(),
        **about,
    )
    if earlier is not None:
        delta = compose(earlier.delta, delta)
    assert isinstance(delta, LowRankDelta)  # noqa: S101 - check_method saw to it
    check_norm(delta, hp.limits.norm)
    return delta if earlier is None else with_gain(lm, delta), found.past


def _sites(lm: LM, hp: MethodHParams) -> list[str]:
    """Modules that a method would edit here."""
    from editunlearn.lm.layers import resolve_layers

    layers, _ = resolve_layers(hp.layers, lm.layout.num_layers(lm.model), module(hp.method).DEFAULT_LAYERS)
    return [site.name for site in edited(lm.model, lm.layout, hp, layers)]


def edited(model: Any, layout: Layout, hp: MethodHParams, layers: Sequence[int]) -> list[Site]:
    """The linear maps that a method edits in some blocks: all of them, or the MLP's output projections."""
    from editunlearn.hparams import BlockHParams
    from editunlearn.lm.layout import Site
    from editunlearn.lm.weights import linear_maps

    if not isinstance(hp, BlockHParams):
        return layout.sites(layers)
    return [Site(name, layer) for layer in layers for name in linear_maps(model, layout.block_name(layer))]


def check_past(hp: MethodHParams, past: PastKeys | None) -> None:
    """Raises InputError when there are keys of earlier edits that this method has no use for."""
    from editunlearn.hparams import BlockHParams, MemoryHParams, UnlearnerHParams

    if past is None or not past.keys:
        return
    if isinstance(hp, UnlearnerHParams | BlockHParams):
        raise InputError(
            f"{hp.method} trains weights and knows no keys that it could preserve: leave --past out, merge the earlier "
            "edit, and give its facts as well."
        )
    if isinstance(hp, MemoryHParams):
        raise InputError(
            f"{hp.method} changes no weights, so that it cannot disturb the keys of earlier edits: leave --past out. "
            "To go on with an earlier memory, give --continue its folder."
        )
