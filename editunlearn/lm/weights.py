"""Modules by name and their weights as (out, in) matrices, whichever way a model stores them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from editunlearn.errors import InputError, UnsupportedError


def find(model: nn.Module, name: str) -> nn.Module | None:
    """A module by its full name, None when there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def module(model: nn.Module, name: str) -> nn.Module:
    """A module by its full name.

    Raises:
        InputError: the model has no module of that name.
    """
    found = find(model, name)
    if found is None:
        raise InputError(f"the model ({type(model).__name__}) has no module {name!r}.")
    return found


def is_conv1d(child: nn.Module) -> bool:
    """True for the linear map of GPT-2, whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(child, Conv1D)


def linear_maps(model: nn.Module, within: str) -> list[str]:
    """Full names of all linear maps inside a module, in its order; packed quantised ones count."""
    inside = module(model, within).named_modules()
    return [f"{within}.{name}" for name, child in inside if isinstance(child, nn.Linear) or is_conv1d(child)]


def is_transposed(model: nn.Module, name: str) -> bool:
    """True when the weight is stored as (in, out), as in Conv1D; told by type, a square one looks alike."""
    return is_conv1d(module(model, name))


def read_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a linear map as an (out, in) view, however it is stored; writing to it changes the model.

    Raises:
        InputError: no such module.
        UnsupportedError: it has no two-dimensional floating-point weight (quantised, or not a linear map), or that is
            offloaded.
    """
    if is_offloaded(module(model, name)):
        raise UnsupportedError(
            f"{name} is offloaded, so that it cannot be changed in memory. Merge files (editunlearn export), "
            "train a LoRA (train.what=lora), or load the model without offload."
        )
    return fetch_weight(model, name)


def fetch_weight(model: nn.Module, name: str) -> Tensor:
    """The same, only to be read: one that is offloaded is fetched.

    Raises:
        InputError, UnsupportedError: as :func:`read_weight`.
    """
    child = module(model, name)
    how = quantisation(model, name)
    if how is not None:
        raise UnsupportedError(
            f"{name} is {how}; merging would round the edit away. Use --save lora, or load in bfloat16."
        )
    with present(child):
        weight = getattr(child, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedError(f"{name} ({type(child).__name__}) has no (out, in) floating-point weight to edit.")
    weight = weight.detach()
    return weight.t() if is_conv1d(child) else weight


@contextmanager
def present(child: nn.Module) -> Iterator[None]:
    """A module's own parameters and buffers are in memory inside, where accelerate keeps them elsewhere."""
    if getattr(child, "_hf_hook", None) is None or not any(t.is_meta for t in _own(child)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(child):
        yield


def _own(child: nn.Module) -> list[Tensor]:
    return [*child.parameters(recurse=False), *child.buffers(recurse=False)]


def is_offloaded(child: nn.Module) -> bool:
    """True when a module's weights are fetched by accelerate for each pass, and not in memory between."""
    hook = getattr(child, "_hf_hook", None)
    return hook is not None and bool(getattr(hook, "offload", False)) and any(t.is_meta for t in _own(child))


def device_of(child: nn.Module) -> torch.device:
    """Where a module with a ``weight`` computes."""
    found: Any = child.weight.device
    if found.type == "meta" and is_offloaded(child):
        found = torch.device(child._hf_hook.execution_device)  # type: ignore[union-attr, arg-type]
    return torch.device(found)


def shape(model: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of a linear map, packed or not."""
    child: Any = module(model, name)
    if quantisation(model, name) is not None:
        return int(child.out_features), int(child.in_features)
    weight = getattr(child, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnsupportedError(f"{name} ({type(child).__name__}) has no (out, in) floating-point weight to edit.")
    out, width = weight.shape
    return (int(width), int(out)) if is_conv1d(child) else (int(out), int(width))


def root_mean_square(model: nn.Module, name: str) -> float:
    """Of the entries of a linear map; those of a packed one are seen in what it makes of random inputs."""
    if quantisation(model, name) is None:
        return float(fetch_weight(model, name).float().square().mean().sqrt())
    width, child = shape(model, name)[1], module(model, name)
    signs = torch.randint(0, 2, (64, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    with torch.no_grad():
        zero, seen = (child(x.to(device_of(child))).float() for x in (torch.zeros_like(signs[:1]), signs))
    return float((seen - zero).square().mean().sqrt()) / math.sqrt(width)


def quantisation(model: nn.Module, name: str) -> str | None:
    """How a module's weight is quantised, e.g. ``4-bit (nf4)``; None for an ordinary floating-point weight.

    Told by class names and attributes, so that no quantisation library needs to be installed.
    """
    child = module(model, name)
    weight = getattr(child, "weight", None)
    kinds = {cls.__name__ for cls in type(child).__mro__} | {cls.__name__ for cls in type(weight).__mro__}
    if kinds & {"Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"}:
        state = getattr(weight, "quant_state", None)
        scheme = getattr(state, "quant_type", None) or getattr(weight, "quant_type", None) or "bitsandbytes"
        return f"4-bit ({scheme})"
    if kinds & {"Linear8bitLt", "Int8Params"}:
        return "8-bit (int8)"
    if hasattr(child, "qweight") or hasattr(child, "W_q"):
        bits = getattr(child, "bits", None) or getattr(child, "w_bit", None) or getattr(child, "nbits", None)
        label = type(child).__name__
        return f"{bits}-bit ({label})" if isinstance(bits, int) else f"quantised ({label})"
    if isinstance(weight, Tensor):
        if type(weight) not in (Tensor, nn.Parameter) and "uant" in type(weight).__name__:
            return f"quantised ({type(weight).__name__})"
        if weight.is_floating_point() and weight.element_size() == 1:
            return f"8-bit ({str(weight.dtype).removeprefix('torch.')})"
        if not weight.is_floating_point() and not weight.is_complex():
            return f"{8 * weight.element_size()}-bit ({str(weight.dtype).removeprefix('torch.')})"
    return None
