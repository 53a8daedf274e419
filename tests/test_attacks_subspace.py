"""The subspace attack: the directions are those of the dense change, and they are gone from the outputs."""

from __future__ import annotations

import delta_samples as samples
import pytest
import tiny
import torch

from editunlearn.errors import InputError
from editunlearn.evaluation.attacks.subspace import ablated, written_directions
from editunlearn.lm.hooks import on_output, stack


def test_directions_are_those_of_the_dense_change() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 4, generator=draw), torch.randn(4, 30, generator=draw)
    u = torch.linalg.svd((left @ right).double())[0]
    for count in (1, 3, 4, 9):
        found = written_directions(left, right, count)
        wanted = u[:, : min(count, 4)].float()
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-5, rtol=0)
    assert written_directions(left[:, :1].expand(20, 4), right, 4).shape == (20, 1)


@pytest.mark.parametrize("kind", samples.TYPES)
def test_the_outputs_have_nothing_left_in_them(kind: str) -> None:
    lm = tiny.lm(kind)
    plain, delta = samples.logits(lm.model), samples.delta(lm, scale=0.5)
    with delta.applied(lm):
        edited = samples.logits(lm.model)
    seen = {}
    with ablated(lm, delta, 4):
        hooks = [
            on_output(lm.layout.module(lm.model, n), lambda _x, y, n=n: seen.update({n: y.flatten(0, -2)}))  # type: ignore[misc]
            for n in delta.factors
        ]
        with stack(hooks):
            attacked = samples.logits(lm.model)
    for name, factors in delta.factors.items():
        basis = written_directions(factors.left, factors.right, 4)
        assert float((seen[name] @ basis).abs().max()) < 1e-3 * float(seen[name].abs().max())
    assert not torch.equal(attacked, edited) and torch.equal(samples.logits(lm.model), plain)
    with pytest.raises(InputError, match="0 directions"), ablated(lm, delta, 0):
        pass
