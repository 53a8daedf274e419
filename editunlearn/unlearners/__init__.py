"""Registry of the unlearners, methods that train a model to forget: name -> settings, imported only when used.

An unlearner's settings say what it minimises (``objective``), or how it comes to its change (``fit``), for what is
more than a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from editunlearn.errors import InputError
from editunlearn.naming import did_you_mean

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.hparams import UnlearnerHParams
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "ga": "objectives.GA",
        "graddiff": "objectives.GradDiff",
        "kl": "objectives.KL",
        "idk": "objectives.IDK",
        "dpo": "objectives.DPO",
        "npo": "objectives.NPO",
        "simnpo": "objectives.SimNPO",
        "kto": "objectives.KTO",
        "undial": "objectives.UNDIAL",
        "ce_u": "objectives.CEU",
        "wga": "objectives.WGA",
        "satimp": "objectives.SatImp",
        "pdu": "objectives.PDU",
        "altpo": "objectives.AltPO",
        "ihl": "objectives.IHL",
        "rmu": "objectives.RMU",
        "random_labels": "objectives.RandomLabels",
        "adversarial_samples": "objectives.AdversarialSamples",
        "memflex": "localised.MemFlex",
        "grin": "localised.GRIN",
        "sure": "localised.SURE",
        "loku": "localised.LoKU",
        "task_vector": "localised.TaskVector",
    }
)


def names() -> list[str]:
    """Names of all unlearners, in the order in which help and tables show them."""
    return list(METHODS)


def schema(method: str) -> type[UnlearnerHParams]:
    """The settings of a method; importing them does not import torch.

    Raises:
        InputError: no such method; the message lists the known ones.
    """
    if method not in METHODS:
        raise InputError(f"unknown unlearner {method!r}.{did_you_mean(method, METHODS)} Known: {', '.join(METHODS)}.")
    module, name = METHODS[method].split(".")
    found: type[UnlearnerHParams] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def fit(
    lm: LM,
    request: ForgetRequest,
    hp: UnlearnerHParams,
    *,
    work: Workspace | None = None,
    console: Console | None = None,
    store_facts: bool = False,
    target_strategy: str = "counterfactual",
) -> Delta:
    """The change that makes the model forget; the model itself is as it was when this returns.

    Args:
        request: facts with targets, and facts to keep.
        work: keeps the unfinished training. None: an interrupted run starts over.
        store_facts: keep the facts' text in the manifest.
        target_strategy: how the targets were made, for the manifest.

    Raises:
        InputError: blocks or modules that the model does not have, facts without target, nothing to keep.
        NumericalError: the training diverged; the last state that was well is a delta in the workspace.
    """
    from editunlearn.console import Console
    from editunlearn.deltas.build import what_was_asked
    from editunlearn.unlearners import flow
    from editunlearn.workspace import Workspace

    work, console = work or Workspace(None, {}), console or Console(quiet=True)
    hp = flow.settled(lm, hp, work, console)
    about = what_was_asked(request, hp, target_strategy, store_facts=store_facts)
    return flow.run(lm, request, hp, work, console, about)
