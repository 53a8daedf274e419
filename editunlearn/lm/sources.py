"""Where a model comes from, and everything that can be said about it before a weight is read."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from editunlearn.errors import InputError

SourceKind = Literal["hub", "path", "gguf", "demo"]

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
DEMO = "demo"


@dataclass(frozen=True)
class Source:
    """What a model name stands for. ``place`` is a hub id, or an absolute path; empty for the demo."""

    kind: SourceKind
    place: str


def default_cache_dir() -> Path:
    """``$EDITUNLEARN_CACHE``, else ``editunlearn`` in the XDG cache folder (``~/.cache``); not made here."""
    own = os.environ.get("EDITUNLEARN_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "editunlearn"


def resolve_source(name: str | Path) -> Source:
    """Tell what a model name stands for; looks at the file system, not at the network.

    ``demo`` is always the demo model (a folder of that name is ``./demo``); a path comes before a hub id.

    Raises:
        InputError: a path that does not exist, a folder that is no model, a file that is no GGUF, no hub id.
    """
    text = str(name)
    if text == DEMO:
        return Source("demo", "")
    path = Path(text).expanduser()
    if path.is_dir():
        _check_folder(path, text)
        return Source("path", str(path.absolute()))
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return Source("gguf", str(path.absolute()))
        raise InputError(f"{text}: a file that is not GGUF. Give the model's folder, a .gguf file, a hub id or 'demo'.")
    if text.endswith(".gguf") or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise InputError(f"{text}: no such file or folder. Give a model folder, a .gguf file, a hub id or 'demo'.")
    if not _HUB_ID.match(text) or ".." in text or "--" in text:
        raise InputError(f"{text!r} is neither an existing path nor a hub id such as 'Qwen/Qwen3-0.6B'.")
    return Source("hub", text)


def _check_folder(path: Path, text: str) -> None:
    config = path / "config.json"
    if not config.is_file():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{text}: a LoRA adapter, not a model (no config.json). Load its base model, or merge it.")
        raise InputError(f"{text}: no config.json, so this is not a model folder (as save_pretrained writes it).")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise InputError(f"{config}: not readable as JSON ({problem}).") from None
    if not isinstance(content, dict) or not content.get("model_type"):
        raise InputError(f"{config}: has no 'model_type', so the architecture is unknown.")
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise InputError(f"{text}: has a config.json but no weights (*.safetensors or pytorch_model.bin).")


def hub_unreachable() -> bool:
    """True when the hub's name cannot be resolved, so that only files in the Hugging Face cache can be used.

    Without this an offline machine waits through half a minute of retries. Behind a proxy the proxy resolves
    names, so nothing can be said.
    """
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    host = re.sub(r"^\w+://", "", os.environ.get("HF_ENDPOINT") or "https://huggingface.co").split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.getaddrinfo(name, int(port or 443))
    except (OSError, ValueError):
        return True
    return False


def read_options(source: Source, revision: str | None) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained`` of config, tokenizer and weights alike.

    Raises:
        InputError: a revision for something that is not on the hub.
    """
    if source.kind == "hub":
        # Code from a checkpoint is never run: an architecture that needs it is reported as unknown.
        return {"revision": revision, "local_files_only": hub_unreachable(), "trust_remote_code": False}
    if revision is not None:
        raise InputError(f"revision {revision!r} is for hub ids; {source.place or DEMO} has no revisions.")
    if source.kind == "gguf":
        return {"gguf_file": Path(source.place).name, "local_files_only": True}
    return {"local_files_only": True}


def reader_place(source: Source) -> str:
    """The first argument of ``from_pretrained``: GGUF files are given as their folder and a file name."""
    return str(Path(source.place).parent) if source.kind == "gguf" else source.place


def explain(source: Source, problem: Exception) -> InputError:
    """An error of transformers or the hub in our words: the place, the cause in a line, and what to do."""
    first = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
    if source.kind == "hub":
        kinds = {cls.__name__ for cls in type(problem.__cause__ or problem).__mro__}
        if "GatedRepoError" in kinds:
            hint = "Accept its terms on its page, then `hf auth login`."
        elif "RevisionNotFoundError" in kinds:
            hint = "Check --revision."
        elif "LocalEntryNotFoundError" in kinds:
            hint = "It is not in the Hugging Face cache and the hub is out of reach: give a folder or 'demo'."
        else:
            hint = "Give a hub id, a folder, a .gguf file or 'demo'; a private model needs `hf auth login`."
        return InputError(f"model {source.place!r} cannot be read from the hub: {first} {hint}")
    return InputError(f"{source.place}: cannot be read: {first}")


def check_gguf_installed() -> None:
    """Raises:
    InputError: the package that decodes GGUF files is missing.
    """
    from importlib.util import find_spec

    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]  # transformers asks for both
    if missing:
        raise InputError(f"reading .gguf files needs {' and '.join(missing)}: pip install 'editunlearn[demo]'.")


def peek_config(name: str | Path = DEMO, revision: str | None = None, *, source: Source | None = None) -> Any:
    """The configuration of a model, without its weights.

    Returns:
        A ``transformers.PreTrainedConfig``.

    Raises:
        InputError: the model cannot be found or read, or its architecture is unknown to transformers.
    """
    source = source or resolve_source(name)
    options = read_options(source, revision)
    if source.kind == "demo":
        from editunlearn.lm.converted import demo_config

        return demo_config()
    if source.kind == "gguf":
        check_gguf_installed()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(reader_place(source), **options)
    except Exception as problem:  # a damaged file ends in whatever its parser raises (struct.error, IndexError)
        raise explain(source, problem) from problem


@dataclass(frozen=True)
class ModelSize:
    """Number of parameters (tied ones once), and the bytes that they take by dtype name."""

    parameters: int
    bytes: dict[str, int]


def estimate(config: Any) -> ModelSize:
    """Size of a model from its configuration alone: built on the meta device, which allocates nothing."""
    model = meta_model(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize(count, {"float32": 4 * count, "bfloat16": 2 * count, "float16": 2 * count})


def meta_model(config: Any) -> Any:
    """The model without weights, on the meta device, with tied parameters tied."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        return auto.from_config(copy.deepcopy(config))
