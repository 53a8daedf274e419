"""Makes a delta permanent: in a loaded model, or in a checkpoint folder without loading the model."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from editunlearn.artifacts import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    cached_json,
    sha256_file,
    sync,
)
from editunlearn.deltas import shards
from editunlearn.deltas.arithmetic import merged_weight, tensor_bytes
from editunlearn.deltas.build import check_finite
from editunlearn.deltas.files import check_base, stale_weight
from editunlearn.deltas.gain import Gain, measure, realised_gain
from editunlearn.deltas.kinds import Delta, written
from editunlearn.deltas.lowrank import LoadedModel, WeightDelta
from editunlearn.errors import InputError, NumericalError, StaleError, UnsupportedError
from editunlearn.lm.weights import module, read_weight

JOURNAL = ".merge.json"


@torch.no_grad()
def merge(lm: LoadedModel, delta: Delta, *, force: bool = False) -> dict[str, Gain]:
    """Writes a delta into the weights of a loaded model, for good. Everything is checked before the first
    write.

    Args:
        force: merge into other weights than the delta was made for.

    Returns:
        The realised gain by module (see `gain.gain_warnings`).

    Raises:
        InputError: the delta does not fit the model.
        UnsupportedError: a delta that changes no weights, a quantised module, or one whose weight is tied to
            another's.
        StaleError: other base weights, and not ``force``.
        NumericalError: a merged weight would not be finite.
    """
    delta = written(delta, "merge")
    check_finite(delta.tensors())
    for name in delta.factors:
        read_weight(lm.model, name)  # refuses a quantised module with what to do about it
        _refuse_tied(lm.model, name)
    check_base(delta, lm, force=force)
    report = measure(lm, delta)
    for name, factors in delta.factors.items():
        weight = read_weight(lm.model, name)
        weight.copy_(merged_weight(weight, factors.left, factors.right))
    return report


def _refuse_tied(model: nn.Module, name: str) -> None:
    owner = module(model, name)
    weight = owner._parameters["weight"]
    for other_name, other in model.named_modules():
        if other is not owner and any(parameter is weight for parameter in other._parameters.values()):
            raise UnsupportedError(
                f"the weight of {name} is tied to {other_name}; merging would change both. Use --save lora, "
                "or untie them."
            )


@torch.no_grad()
def merge_folder(
    base_dir: str | Path, delta: Delta, out_dir: str | Path, *, card: str | None = None, force: bool = False
) -> dict[str, Gain]:
    """Writes an edited copy of a safetensors checkpoint; in memory is one edited tensor at a time.

    Shards keep their names, dtypes, tensor order and metadata. Each appears under its name when complete, the
    index (or the only file) last. A run that was killed goes on where it was: finished shards whose checksum
    still holds are kept.

    Args:
        base_dir: a folder with ``model.safetensors`` or an index.
        out_dir: another folder; made when missing.
        card: text of ``README.md``, in place of the base model's; part of the merge, which is not done without it.
        force: merge into other weights than the delta was made for.

    Returns:
        The realised gain by module.

    Raises:
        InputError: same folder, a tensor that is missing or ambiguous, another shape, or a model in
            ``out_dir`` that is not from an interrupted run of this merge.
        UnsupportedError: no safetensors files, an edited tensor is quantised, or the delta changes no weights.
        StaleError: other base weights, and not ``force``.
        NumericalError: a merged weight would not be finite; no weights are written.
    """
    base, out = Path(base_dir), Path(out_dir)
    if out.resolve() == base.resolve():
        raise InputError(f"{out} is the base model itself; a merge is not done in place. Choose another folder.")
    delta = written(delta, "merge")
    check_finite(delta.tensors())
    tensors = shards.read_checkpoint(base)
    edited = _edited_tensors(base, delta, tensors)
    report = _check_tensors(base, delta, edited, force)
    journal = _open_journal(out, delta, sorted({stored.file for stored in tensors.values()}))
    shards.copy_other_files(base, out)
    for file in journal["files"]:
        _write_shard(base, out, file, delta, {n: s for n, s in edited.items() if s.file == file}, journal)
    if (base / shards.INDEX).is_file() and not (base / shards.SINGLE).is_file():
        atomic_write_bytes(out / shards.INDEX, (base / shards.INDEX).read_bytes())
    if card is not None:
        atomic_write_text(out / "README.md", card)
    (out / JOURNAL).unlink(missing_ok=True)
    return report


def _edited_tensors(base: Path, delta: WeightDelta[Any], tensors: dict[str, shards.Stored]) -> dict[str, shards.Stored]:
    found: dict[str, shards.Stored] = {}
    problems: list[str] = []
    for name, site in delta.manifest.sites.items():
        key = shards.find_key(name, tensors)
        shards.refuse_quantised(base, name, key, tensors)
        stored = tensors[str(key)]
        shape = site.shape[::-1] if site.transposed else site.shape
        if stored.shape != shape:
            problems.append(f"{base}: {key} is {stored.shape}, the delta is for {shape}.")
        found[name] = stored
    if len({stored.key for stored in found.values()}) < len(found):
        problems.append(f"{base}: several modules of the delta match the same tensor.")
    if problems:
        raise InputError(problems)
    return found


def _check_tensors(
    base: Path, delta: WeightDelta[Any], edited: dict[str, shards.Stored], force: bool
) -> dict[str, Gain]:
    """Fingerprints and realised gain of every edited tensor, before anything is written."""
    report: dict[str, Gain] = {}
    stale: list[str] = []
    for name, stored in edited.items():
        site, tensor = delta.manifest.sites[name], shards.read_tensor(base, stored)
        weight = tensor.t() if site.transposed else tensor
        problem = None if force else stale_weight(name, site, weight, delta.manifest)
        stale += [problem] if problem else []
        try:
            report[name] = realised_gain(weight, delta.factors[name], tensor.dtype)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
    if stale:
        raise StaleError(stale)
    return report


def _write_shard(
    base: Path,
    out: Path,
    file: str,
    delta: WeightDelta[Any],
    edited: dict[str, shards.Stored],
    journal: dict[str, Any],
) -> None:
    source = (base / file).stat()
    mark = [source.st_size, source.st_mtime_ns]
    done = journal["done"].get(file)
    target = out / file
    if done and done["source"] == mark and target.is_file() and sha256_file(target) == done["sha256"]:
        return
    # A fixed name: what a killed run left of a large shard is overwritten and not kept beside the new one.
    partial = out / f".{file}.partial"
    shutil.copyfile(base / file, partial)
    for name, stored in edited.items():
        tensor, factors = shards.read_tensor(base, stored), delta.factors[name]
        transposed = delta.manifest.sites[name].transposed
        merged = merged_weight(tensor.t() if transposed else tensor, factors.left, factors.right)
        shards.overwrite(partial, stored, merged.t() if transposed else merged)
    sync(partial)
    journal["done"][file] = {"source": mark, "sha256": sha256_file(partial)}
    os.replace(partial, target)
    atomic_write_json(out / JOURNAL, journal)


def _open_journal(out: Path, delta: WeightDelta[Any], files: list[str]) -> dict[str, Any]:
    """The journal of an interrupted run of the same merge, or a new one.

    Raises:
        InputError: the folder has weights that such a run did not write.
    """
    fresh: dict[str, Any] = {"delta": _fingerprint(delta), "files": files, "done": {}}
    path = out / JOURNAL
    old: dict[str, Any] = cached_json(path, dict) or {}
    if old.get("delta") == fresh["delta"] and old.get("files") == files:
        return old
    weights = sorted(entry.name for entry in out.glob("*.safetensors")) if out.is_dir() else []
    if weights and not path.is_file():
        raise InputError(f"{out} already holds weights ({weights[0]}, {len(weights)} files). Choose an empty folder.")
    for name in (*weights, shards.INDEX):  # of an interrupted merge of another delta: nothing to keep
        (out / name).unlink(missing_ok=True)
    atomic_write_json(path, fresh)
    return fresh


def _fingerprint(delta: WeightDelta[Any]) -> str:
    digest = hashlib.sha256()
    for name, factors in delta.factors.items():
        digest.update(f"{name} {factors.shape} {tuple(factors.left.shape)}".encode())
        for part in (factors.left, factors.right):
            digest.update(tensor_bytes(part) if part is not None else b"")
    return digest.hexdigest()
