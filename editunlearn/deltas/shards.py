"""Safetensors checkpoints on disk, as ranges of bytes.

A merge changes the values of a few tensors and nothing else, so a shard is copied as a file and the bytes of
the edited tensors are overwritten in the copy: header, order and metadata stay, and no other tensor passes
through memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from editunlearn.deltas.arithmetic import tensor_bytes
from editunlearn.errors import InputError, UnsupportedError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Weights in other formats; a merged folder has exactly one copy of the weights.
_WEIGHT_ENDINGS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".index.json",
)


@dataclass(frozen=True)
class Stored:
    """Where one tensor is: file, dtype as safetensors names it, shape, bytes ``start:stop`` of the file."""

    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint by key, from the headers alone. A single file goes before an index, as
    transformers does.

    Raises:
        InputError: no such folder, or a shard is missing or damaged.
        UnsupportedError: no safetensors weights in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.")
    if (folder / SINGLE).is_file():
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{folder / INDEX}: not an index of safetensors files (no 'weight_map').") from None
    else:
        raise UnsupportedError(
            f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints can be merged on disk. "
            "Load the model and save it with save_pretrained first."
        )
    problems = [
        f"{folder / file} is listed in {INDEX} but does not exist." for file in files if not (folder / file).is_file()
    ]
    if problems:
        raise InputError(problems)
    return {stored.key: stored for file in files for stored in _read_header(folder / file)}


def _read_header(path: Path) -> Iterator[Stored]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: Any = json.loads(file.read(length))
        entries = [
            (key, entry["dtype"], tuple(entry["shape"]), [8 + length + offset for offset in entry["data_offsets"]])
            for key, entry in header.items()
            if key != "__metadata__"
        ]
    except (ValueError, MemoryError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}).") from error
    size = path.stat().st_size
    for key, dtype, shape, (start, stop) in entries:
        if stop > size:
            raise InputError(f"{path}: cut off; {key} ends at byte {stop}, the file at {size}.")
        yield Stored(key, path.name, dtype, shape, start, stop)


def read_tensor(folder: Path, stored: Stored) -> Tensor:
    """One tensor, as stored."""
    with safe_open(folder / stored.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(stored.key)
    return tensor


def overwrite(path: Path, stored: Stored, tensor: Tensor) -> None:
    """Replaces the bytes of one tensor in a copy of its file; dtype and shape must be as stored."""
    data = tensor_bytes(tensor)
    if len(data) != stored.stop - stored.start or tuple(tensor.shape) != stored.shape:
        raise ValueError(f"{stored.key}: {tuple(tensor.shape)} in {len(data)} bytes does not replace {stored}")
    with path.open("r+b") as file:
        file.seek(stored.start)
        file.write(data)


def find_key(module_name: str, tensors: Mapping[str, Stored], ending: str = "weight") -> str | None:
    """The checkpoint key of a module's weight; None when there is none.

    Checkpoints and modules differ in the front part of the names (GPT-2 files lack ``transformer.``,
    multimodal wrappers add one), so the longest common ending counts, down to the numbered block:
    ``h.3.mlp.c_proj.weight``.

    Raises:
        InputError: several keys match equally well.
    """
    parts = module_name.split(".")
    first_number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    for start in range(max(first_number - 1, 0) + 1):
        suffix = ".".join([*parts[start:], ending])
        matches = [key for key in tensors if key == suffix or key.endswith(f".{suffix}")]
        if suffix in matches:
            return suffix
        if len(matches) > 1:
            raise InputError(f"{module_name} matches several tensors of the checkpoint: {', '.join(sorted(matches))}.")
        if matches:
            return matches[0]
    return None


def refuse_quantised(folder: Path, module_name: str, key: str | None, tensors: Mapping[str, Stored]) -> None:
    """Makes sure that a weight is stored as ordinary floating-point numbers.

    Raises:
        UnsupportedError: it is quantised.
        InputError: it is absent.
    """
    packed = next((e for e in ("qweight", "weight_packed", "W_q") if find_key(module_name, tensors, e)), None)
    if key is not None and packed is None and tensors[key].dtype in _FLOATS:
        return
    if key is None and packed is None:
        raise InputError(f"{folder} has no tensor for {module_name}. Is it the model that the delta was made for?")
    how = _scheme(folder) or (tensors[key].dtype if key else packed)
    raise UnsupportedError(
        f"{module_name} is {how}; merging would round the edit away. Use --save lora, or load in bfloat16."
    )


def _scheme(folder: Path) -> str | None:
    """The words for the quantisation that ``config.json`` states."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()).get("quantization_config") if path.is_file() else None
    if not config:
        return None
    bits = 4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else config.get("bits")
    kind = config.get("bnb_4bit_quant_type") if bits == 4 and "load_in_4bit" in config else config.get("quant_method")
    return f"{bits}-bit ({kind})" if bits else f"quantised ({kind})"


def copy_other_files(base: Path, out: Path) -> None:
    """Copies configuration, tokenizer and code: all top-level files but weights and the model card."""
    for path in sorted(base.iterdir()):
        skip = path.name.startswith(".") or path.name.lower() == "readme.md" or path.name.endswith(_WEIGHT_ENDINGS)
        if path.is_file() and not skip:
            temporary = out / f".{path.name}.partial"
            shutil.copyfile(path, temporary)
            temporary.replace(out / path.name)
