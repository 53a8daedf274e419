"""Every method by its name, whichever family it is of: editors solve for a change, unlearners train one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from editunlearn import editors, unlearners
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
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace


def names() -> list[str]:
    """Names of all methods, in the order in which help and tables show them."""
    return [*editors.names(), *unlearners.names()]


def schema(method: str) -> type[MethodHParams]:
    """The hparams class of a method; importing it does not import torch.

    Raises:
        InputError: no such method; the message lists the known ones.
    """
    if not isinstance(method, str) or method not in names():
        hint = did_you_mean(method, names()) if isinstance(method, str) else ""
        raise InputError(f"unknown method {method!r}.{hint} Methods: {', '.join(names())}.")
    return unlearners.schema(method) if method in unlearners.METHODS else editors.schema(method)


def fit(lm: LM, request: ForgetRequest, hp: MethodHParams, **options: Any) -> Delta:
    """The change that a method makes of a request; the model itself is not changed.

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
    """Like :func:`fit`, with the past keys that a next edit needs; see :func:`editors.fit` and :func:`unlearners.fit`.

    Raises:
        InputError: past keys or earlier edits, and a method that has no use for them.
    """
    from editunlearn.editors.past import PastKeys
    from editunlearn.hparams import UnlearnerHParams

    if not isinstance(hp, UnlearnerHParams):
        return editors.run(
            lm,
            request,
            hp,
            past=past,
            earlier=earlier,
            work=work,
            cache=cache,
            console=console,
            store_facts=store_facts,
            target_strategy=target_strategy,
        )
    editors.check_past(hp, past)
    if earlier is not None:
        earlier.check_method(hp, [])
    delta = unlearners.fit(
        lm, request, hp, work=work, console=console, store_facts=store_facts, target_strategy=target_strategy
    )
    return delta, PastKeys()
