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
    from editunlearn.hparams import EditorHParams

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
