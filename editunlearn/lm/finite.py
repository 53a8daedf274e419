"""Where numbers that are not finite begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editunlearn.lm.hooks import first_tensor

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM


@torch.no_grad()
def where_not_finite(lm: LM, text: str) -> str | None:
    """Name of the first module whose output for ``text`` has a number that is not finite; None: there is none."""
    found: list[str] = []

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            tensor = first_tensor(output)
            if not found and isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                found.append(name)

        return lm.layout.module(lm.model, name).register_forward_hook(hook)

    handles = [watch(name) for name, child in lm.model.named_modules() if not any(True for _ in child.children())]
    try:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]], device=lm.device)
        lm.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
