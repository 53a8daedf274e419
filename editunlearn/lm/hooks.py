"""Reading and changing what flows through a module, with early stop; modules may return a tensor or a tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a hook to leave the forward pass once everything wanted has been seen."""


def first_tensor(output: object) -> Tensor:
    """The hidden states of a module's output: itself, or the first element of a tuple."""
    value = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor or a tuple that begins with one, got {type(value).__name__}")
    return value


def with_first(output: object, value: Tensor) -> object:
    """``output`` with its hidden states replaced by ``value``, in the same shape of container."""
    if isinstance(output, tuple):
        return (value, *output[1:])
    return [value, *output[1:]] if isinstance(output, list) else value


def _input_of(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    return first_tensor(args[0] if args else next(iter(kwargs.values())))


@contextmanager
def on_input(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the input of ``module`` at each forward pass, however it is passed."""
    handle = module.register_forward_pre_hook(lambda _m, args, kwargs: see(_input_of(args, kwargs)), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``change(input, output)``; what it returns replaces the output, unless it is None."""

    def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        changed = change(_input_of(args, kwargs), first_tensor(output))
        return None if changed is None else with_first(output, changed)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def low_rank_hook(left: Tensor, right: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """``y + (x right^T) left^T`` in float32, rounded once to the dtype of ``y``; left (d_out, r), right (r, d_in)."""

    def change(inputs: Tensor, output: Tensor) -> Tensor:
        here = inputs.device  # a model may be spread over several
        return (output.float() + (inputs.float() @ right.to(here).T) @ left.to(here).T).to(output.dtype)

    return change


@contextmanager
def contiguous_input(head: nn.Module) -> Iterator[None]:
    """Give the output head a contiguous input.

    ``generate`` slices the last position out of each row; on the CPU a matrix product with such a strided slice copies
    the whole weight once per row, gigabytes for a large vocabulary (seen with torch 2.13).
    """
    handle = head.register_forward_pre_hook(lambda _module, args: (first_tensor(args[0]).contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; each flag is put back at the end, also after an exception.

    Without this a backward pass through the model would also make gradients of all weights, and leave them there.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def run_truncated(model: nn.Module, last: nn.Module, **inputs: Tensor) -> None:
    """Run ``model`` up to and including the input of ``last``; its output and everything after are not computed."""

    def stop(_tensor: Tensor) -> None:
        raise StopForward

    with on_input(last, stop):
        try:
            model(**inputs)
        except StopForward:
            return
    raise RuntimeError("the forward pass never reached the module that it was to stop at")


@contextmanager
def stack(contexts: Sequence[object]) -> Iterator[None]:
    """Enter several context managers at once."""
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)  # type: ignore[arg-type]
        yield


def read_inputs(model: nn.Module, modules: Sequence[nn.Module], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Inputs of ``modules``, each (batch, length, d_in), in one pass that stops at the last of them.

    The modules must be given in the order in which they run.
    """
    seen: list[Tensor] = []
    with torch.no_grad(), stack([on_input(m, lambda x: seen.append(x.detach())) for m in modules]):
        run_truncated(model, modules[-1], **inputs)
    return seen
