"""Changes of modules' outputs at given tokens of given rows, however the rows are padded or divided over passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from editunlearn.lm.hooks import on_output, stack


@contextmanager
def placed(
    model: nn.Module, modules: Sequence[nn.Module], rows: Tensor, tokens: Tensor, change: Tensor
) -> Iterator[None]:
    """Inside, every pass of ``model`` adds to the outputs of ``modules``; weights and inputs are not touched.

    Tokens are found by the pass's ``position_ids``, so that a pass over the later tokens of the rows, behind a
    key-value cache of the earlier ones, changes nothing that is not in it. Padding bears the position of a token next
    to it and may be changed with that; the attention mask leaves it out of everything.

    Args:
        rows: (t,) int64, numbers of rows of a pass.
        tokens: (t,) int64, for each the token that is changed, counted in the row from 0 without padding.
        change: (t, m, d_out) float32, what is added to the output of each of the m modules.
    """
    pass_: dict[str, Tensor] = {}

    def see(_model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions: Tensor = kwargs["position_ids"].cpu()
        which, column = (positions[rows] == tokens[:, None]).nonzero(as_tuple=True)
        pass_.update(positions=positions, which=which, column=column)

    def adding(index: int) -> Callable[[Tensor, Tensor], Tensor | None]:
        def add(_inputs: Tensor, output: Tensor) -> Tensor | None:
            which = pass_["which"]
            if len(which) == 0:
                return None
            flat = output.reshape(*pass_["positions"].shape, -1).clone()
            here = rows[which].to(flat.device), pass_["column"].to(flat.device)
            flat[here] = (flat[here].float() + change[which, index].to(flat.device)).to(flat.dtype)
            return flat.reshape(output.shape)

        return add

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with stack([on_output(module, adding(index)) for index, module in enumerate(modules)]):
            yield
    finally:
        handle.remove()
