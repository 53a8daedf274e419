"""Unlearning as knowledge editing: rewrite facts in a language model to a refusal and leave the rest as it was.

Public names load their module on first use, so that ``import editunlearn`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editunlearn.deltas.files import load as load_delta
    from editunlearn.deltas.lora import export_lora
    from editunlearn.deltas.merge import merge
    from editunlearn.facts.readers import load_facts
    from editunlearn.facts.records import Fact, ForgetRequest
    from editunlearn.facts.targets import fill_targets
    from editunlearn.hparams import load_hparams
    from editunlearn.lm.loading import load
    from editunlearn.methods import fit
    from editunlearn.pipeline import forget
    from editunlearn.session import EditSession

__version__ = "0.1.0"

_PUBLIC = {
    "EditSession": "session",
    "Fact": "facts.records",
    "ForgetRequest": "facts.records",
    "export_lora": "deltas.lora",
    "fill_targets": "facts.targets",
    "fit": "methods",
    "forget": "pipeline",
    "load": "lm.loading",
    "load_delta": ("deltas.files", "load"),
    "load_facts": "facts.readers",
    "load_hparams": "hparams",
    "merge": "deltas.merge",
}

__all__ = [
    "EditSession",
    "Fact",
    "ForgetRequest",
    "__version__",
    "export_lora",
    "fill_targets",
    "fit",
    "forget",
    "load",
    "load_delta",
    "load_facts",
    "load_hparams",
    "merge",
]


def __getattr__(name: str) -> Any:
    place = _PUBLIC.get(name)
    if place is None:
        raise AttributeError(f"module 'editunlearn' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = (place, name) if isinstance(place, str) else place
    return getattr(import_module(f"editunlearn.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
