"""Subspace attack: take out of the edited outputs the few directions that the edit writes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editunlearn.deltas.kinds import written
from editunlearn.errors import InputError
from editunlearn.lm.hooks import on_output, stack

if TYPE_CHECKING:
    from editunlearn.deltas.kinds import Delta
    from editunlearn.lm.loading import LM


def written_directions(left: Tensor, right: Tensor | None, count: int) -> Tensor:
    """The ``count`` largest left singular vectors of ``left @ right``, (d_out, <= count), without forming it.

    Args:
        left: (d_out, r). right: (r, d_in); None: ``left`` is (d_out, d_in), the whole change.
    """
    outer, inner = torch.linalg.qr(left.double())
    if right is not None:
        inner = inner @ torch.linalg.qr(right.double().T)[1].T
    u, values, _ = torch.linalg.svd(inner)
    held = int((values > 1e-10 * values[0].clamp(min=1e-300)).sum())
    found: Tensor = (outer @ u[:, : min(count, held)]).float()
    return found


@contextmanager
def ablated(lm: LM, delta: Delta, count: int = 1) -> Iterator[None]:
    """The model with ``delta`` applied and its ``count`` strongest written directions taken out at each edited module.

    Somebody who has the merged model alone can find such directions from what forgotten prompts have in common; here
    they are taken from the delta, which is the most that can be found.

    Raises:
        InputError: no directions.
        UnsupportedError: the delta changes no weights.
    """
    if count < 1:
        raise InputError(f"subspace attack with {count} directions; at least 1.")

    changes = written(delta, "subspace attack").factors

    def without(basis: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def change(_inputs: Tensor, output: Tensor) -> Tensor:
            wide, here = output.float(), basis.to(output.device)
            return (wide - (wide @ here) @ here.T).to(output.dtype)

        return change

    bases = {name: written_directions(f.left, f.right, count) for name, f in changes.items()}
    with delta.applied(lm):
        hooks = [on_output(lm.layout.module(lm.model, name), without(basis)) for name, basis in bases.items()]
        with stack(hooks):
            yield
