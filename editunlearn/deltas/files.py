"""A delta as a folder: ``delta.safetensors`` (factors) and ``delta.json`` (manifest, written last)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from editunlearn.artifacts import atomic_path, atomic_write_bytes, json_bytes, sha256_file
from editunlearn.deltas.arithmetic import dtype_name, weight_sha256
from editunlearn.deltas.build import check_finite
from editunlearn.deltas.kinds import KINDS, AnyManifest, Delta, delta_of, tensor_names
from editunlearn.deltas.lowrank import LoadedModel, check_fits, stored_weight
from editunlearn.deltas.manifest import (
    FORMAT,
    VERSION,
    BaseManifest,
    BaseSite,
    plain_fact,
)
from editunlearn.errors import InputError, StaleError

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact

M = TypeVar("M", bound=BaseManifest)
TENSORS = "delta.safetensors"
MANIFEST = "delta.json"
# The tensors that the manifest in the folder still speaks of, while new ones are being put in place.
PREVIOUS = ".delta.safetensors.previous"


def save(delta: Delta, directory: str | Path, facts: Sequence[Fact] | None = None) -> BaseManifest:
    """Writes a delta so that the folder always holds all of the old one or all of the new one.

    Args:
        directory: made when missing; other files in it are left alone.
        facts: store the text of these facts in the manifest (it is private: default not). Only facts that the
            delta was made from and still holds are written.

    Returns:
        The manifest as written, with the hash of the tensor file.

    Raises:
        NumericalError: a factor is not finite; nothing is written.
    """
    check_finite(delta.tensors())
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in delta.tensors().items()}
    target, previous = folder / TENSORS, folder / PREVIOUS
    manifest = delta.manifest if facts is None else _with_text(delta.manifest, facts)
    with atomic_path(target) as temporary:
        save_file(dict(sorted(tensors.items())), temporary, metadata={"format": FORMAT, "version": str(VERSION)})
        _sort_metadata(temporary)
        manifest = manifest.model_copy(update={"tensors_sha256": sha256_file(temporary)})
        content = json_bytes(manifest.model_dump(mode="json"))
        _keep_previous(folder)
    atomic_write_bytes(folder / MANIFEST, content)
    previous.unlink(missing_ok=True)
    return manifest


def load(directory: str | Path, lm: LoadedModel | None = None) -> Delta:
    """Reads a delta that `save` wrote; the factors are exactly those that were saved.

    Args:
        lm: check that the delta fits this model, too (shapes and names; see `check_base` for the weights
            themselves).

    Raises:
        InputError: a file is missing, damaged, of another format or a newer version, the two files do not
            belong together, or the delta does not fit the model.
    """
    folder = Path(directory)
    manifest = load_manifest(folder)
    path = _matching_tensors(folder, manifest)
    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
                raise InputError(f"{path}: metadata {metadata} is not that of {FORMAT} version {VERSION}.")
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}).") from error
    if found.keys() != (expected := tensor_names(manifest)):
        different = ", ".join(sorted(found.keys() ^ expected))
        raise InputError(f"{path}: its tensors are not those of {MANIFEST}; different: {different}.")
    try:
        delta = delta_of(found, manifest)
    except ValueError as error:
        raise InputError(f"{path}: {error}.") from error
    if lm is not None:
        check_fits(delta.manifest, lm.model)
    return delta


def load_manifest(directory: str | Path) -> AnyManifest:
    """Reads ``delta.json`` alone.

    Raises:
        InputError: it is missing, damaged, or of another format or version.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: not the folder of a saved delta, or a run that was killed before its end."
        )
    try:
        raw: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}).") from error
    kind, version = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else (None, None)
    if kind != FORMAT:
        raise InputError(f"{path}: format is {kind!r}, expected {FORMAT!r}.")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        hint = " It was made by a newer editunlearn; update." if newer else ""
        raise InputError(f"{path}: version is {version!r}, this editunlearn reads {VERSION}.{hint}")
    made_of = raw.get("kind", "low_rank")
    if made_of not in KINDS:
        raise InputError(f"{path}: kind is {made_of!r}, this editunlearn reads {', '.join(KINDS)}.")
    try:
        return KINDS[made_of].model_validate(raw)
    except ValidationError as error:
        problems = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError(problems) from error


def check_base(delta: Delta, lm: LoadedModel, *, force: bool = False) -> None:
    """Makes sure that the model has the weights that the delta was made for.

    For a negated delta it is the other way round: weights that are still those of the base have nothing to
    revert.

    Args:
        force: go on all the same.

    Raises:
        InputError: the delta does not fit the model (also with ``force``).
        StaleError: other weights; names both hashes.
    """
    check_fits(delta.manifest, lm.model)
    if force:
        return
    problems = []
    for name, site in delta.manifest.sites.items():
        problem = stale_weight(name, site, stored_weight(lm.model, name), delta.manifest)
        if problem:
            problems.append(problem)
    if problems:
        raise StaleError(problems)


def stale_weight(name: str, site: BaseSite, weight: torch.Tensor, manifest: BaseManifest) -> str | None:
    """What is wrong with a weight (out, in) as the base of a delta; None when it is the right one."""
    found = weight_sha256(weight, made_in=site.base_dtype)
    if manifest.negated:
        if found != site.base_sha256:
            return None
        return f"{name} has the weight of the unedited model (sha256 {found}); there is nothing to revert."
    if found == site.base_sha256:
        return None
    dtype = dtype_name(weight.dtype)
    same = dtype == site.base_dtype
    loaded = "" if same else f" The delta was made in {site.base_dtype}, this weight is {dtype}."
    return (
        f"{name}: the delta was made for other weights: sha256 {site.base_sha256} ({manifest.base.name}"
        f"{'@' + manifest.base.revision if manifest.base.revision else ''}), but this model has "
        f"{found}.{loaded} Load that model and revision, make the delta anew, or force it."
    )


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file in order: safetensors writes it in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        if len(ordered) > length:
            raise ValueError(f"{path}: the header grew from {length} to {len(ordered)} bytes")
        file.seek(8)
        file.write(ordered.ljust(length))


def _with_text(manifest: M, facts: Sequence[Fact]) -> M:
    sets = []
    for part in manifest.facts:
        held = set(part.ids) - set(part.removed)
        text = tuple(plain_fact(fact) for fact in facts if manifest.hashes_of(fact.id) & held)
        sets.append(part.model_copy(update={"text": text or part.text}))
    return manifest.model_copy(update={"facts": tuple(sets)})


def _keep_previous(folder: Path) -> None:
    """Keeps the tensors that the present manifest speaks of, until a new manifest replaces it."""
    target, previous = folder / TENSORS, folder / PREVIOUS
    if not target.is_file() or not (folder / MANIFEST).is_file():
        return
    if previous.is_file():
        # An earlier save was killed half-way: whichever of the two files the manifest speaks of is the old
        # artifact.
        try:
            if load_manifest(folder).tensors_sha256 == sha256_file(previous):
                return
        except InputError:
            pass
        previous.unlink()
    try:
        os.link(target, previous)
    except OSError:  # the file system has no hard links
        with atomic_path(previous) as temporary:
            shutil.copyfile(target, temporary)


def _matching_tensors(folder: Path, manifest: BaseManifest) -> Path:
    target, previous = folder / TENSORS, folder / PREVIOUS
    if not target.is_file():
        raise InputError(f"{target} does not exist; {MANIFEST} without it is of no use.")
    found = sha256_file(target)
    if found == manifest.tensors_sha256:
        return target
    # A save that was killed between its two renames: the old manifest still has its old tensors.
    if previous.is_file() and sha256_file(previous) == manifest.tensors_sha256:
        return previous
    raise InputError(
        f"{target} has sha256 {found}, but {MANIFEST} speaks of a file with {manifest.tensors_sha256}: the "
        "two do not belong together. Copy both from the same run."
    )
