"""Fingerprints of weights: what an artifact was made on, and whether a model is still that."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm.weights import find, present

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

_PIECE = 1 << 24
# These say where the weights came from or who wrote the file, not what the model computes.
_NOT_THE_MODEL = (
    "_name_or_path",
    "_model_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "transformers_version",
    "architectures",
    "torch_dtype",
    "dtype",
    "use_cache",
)


def fingerprint(lm: LM, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the raw bytes of weights, as they are stored (row-major, their own dtype).

    Args:
        names: modules with a ``weight``, or parameters.

    Returns:
        Hex digest by name, in the given order.

    Raises:
        InputError: there is no weight of that name.
        UnsupportedError: it has no bytes, being on the meta device.
    """
    return {name: _digest(name, _weight(lm, name), "sha256") for name in names}


def _weight(lm: LM, name: str) -> Tensor:
    owner, leaf = find(lm.model, name), "weight"
    if owner is None:
        place, _, leaf = name.rpartition(".")
        owner = find(lm.model, place)
    with present(owner) if owner is not None else nullcontext():
        weight = getattr(owner, leaf, None)
    if not isinstance(weight, Tensor):
        raise InputError(f"{lm.name}: no weight {name!r}.")
    return weight


def model_fingerprint(lm: LM) -> str:
    """One hash of the configuration and of every parameter and saved buffer; 64 hex digits.

    Tied weights count once. Threads share the work, so a 270M model takes about a second. Nothing is cached:
    a model that was edited in place has another fingerprint.

    Raises:
        UnsupportedError: it has no weights, being on the meta device.
    """
    config = lm.model.config.to_diff_dict()
    kept = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    total = hashlib.blake2b(digest_size=32)
    total.update(json.dumps(kept, sort_keys=True, default=str).encode())
    tensors = sorted(_tensors(lm), key=lambda item: item[0])
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        jobs = [
            (name, tensor, [pool.submit(_digest, name, piece, "blake2b") for piece in _pieces(tensor)])
            for name, tensor in tensors
            if not tensor.is_meta
        ]
        found = {name: [piece.result() for piece in pieces] for name, _, pieces in jobs}
    for name, tensor in tensors:
        if name not in found:  # offloaded: one at a time, or all would be in memory
            found[name] = [_digest(name, piece, "blake2b") for piece in _pieces(_weight(lm, name))]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for digest in found[name]:
            total.update(bytes.fromhex(digest))
    return total.hexdigest()


def _tensors(lm: LM) -> Iterator[tuple[str, Tensor]]:
    yield from lm.model.named_parameters()
    every = {name for name, _ in lm.model.named_parameters(remove_duplicate=False)}
    saved = lm.model.state_dict()
    yield from ((name, tensor) for name, tensor in saved.items() if name not in every and isinstance(tensor, Tensor))


def _pieces(tensor: Tensor) -> list[Tensor]:
    """Rows in pieces of about 16 MB, so that one large embedding does not keep the other threads waiting."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return [tensor]
    rows = max(1, _PIECE // max(1, tensor[0].numel() * tensor.element_size()))
    return list(torch.split(tensor.detach(), rows))


def _digest(name: str, tensor: Tensor, kind: str) -> str:
    if tensor.is_meta:
        raise UnsupportedError(f"{name} is on the meta device; load the model with its weights.")
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256() if kind == "sha256" else hashlib.blake2b(digest_size=32)
    digest.update(data.data)
    return digest.hexdigest()
