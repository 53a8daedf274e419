"""Memories at work: beside a model that is lent, or in a model class that brings its own.

This file and what it imports are also what a self-contained folder holds (:mod:`standalone`): nothing here may need
more of this package than those few files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor, empty, float32, nn

from editunlearn.deltas.codebook import Codebook
from editunlearn.deltas.side import SideMemory
from editunlearn.lm.hooks import on_output
from editunlearn.lm.sequences import Watcher

Memory = Codebook | SideMemory
"""Every kind has ``KIND``, ``PARTS`` (its tensors), ``count``, ``shape``, ``operations``, ``settings``, ``of``, ``to``,
``divisible``, ``only``, ``awake``, ``joined`` and ``change``."""

KINDS: Mapping[str, type[Memory]] = MappingProxyType({m.KIND: m for m in (Codebook, SideMemory)})


@contextmanager
def beside(model: nn.Module, memories: Mapping[str, Memory], watcher: Watcher) -> Iterator[None]:
    """Memories, by module name, beside the maps of ``model``; ``watcher`` follows its passes."""
    with ExitStack() as entered:
        for name, memory in memories.items():
            target = model.get_submodule(name)
            device = next(target.parameters()).device
            if device.type == "meta":  # offloaded by accelerate
                device = getattr(target, "_hf_hook").execution_device  # noqa: B009 - torch types attributes as tensors
            here = memory.to(device)
            entered.enter_context(on_output(target, here.change(name, watcher)))
        yield


class Held(nn.Module):
    """The tensors of one memory, which are saved and moved with a model.

    Args:
        site: ``module``, ``kind``, ``settings`` and ``parts`` (shape by name) of the memory.
    """

    def __init__(self, site: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.kind, self.settings = str(site["module"]), KINDS[site["kind"]], dict(site["settings"])
        for part, shape in site["parts"].items():
            self.register_buffer(part, empty(*shape, dtype=float32))

    def memory(self) -> Memory:
        """What the tensors are the parts of."""
        parts: dict[str, Tensor] = {part: getattr(self, part).float() for part in self.kind.PARTS}
        return self.kind.of(parts, self.settings)


class Remembering:
    """Goes before the class of a model: its memories, named by ``config.memories``, are read in every pass."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.memories = nn.ModuleList([Held(site) for site in config.memories])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A pass of the model; ``forward`` keeps the signature that ``generate`` looks at."""
        watcher = self.__dict__.get("_watcher")
        if watcher is None or watcher.model is not self:  # a copy of a model has its own passes
            watcher = self.__dict__["_watcher"] = Watcher(self)  # type: ignore[arg-type]
        watcher.before(self, args, kwargs)  # type: ignore[arg-type]
        held = {memory.name: memory.memory() for memory in self.memories if isinstance(memory, Held)}
        with beside(self, held, watcher):  # type: ignore[arg-type]
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        watcher.after(self, args, kwargs, output)  # type: ignore[arg-type]
        return output
