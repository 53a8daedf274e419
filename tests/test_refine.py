"""The parts of refine that are pure: the optimiser, the drift term, the unit of a step."""

from __future__ import annotations

import torch

from editunlearn.editors.column_adam import ColumnAdam
from editunlearn.editors.refine import drift_energy, step_unit
from editunlearn.numerics.losses import first_of


def test_a_column_moves_along_its_gradient() -> None:
    left = {"m": torch.zeros(4, 2)}
    gradient = torch.tensor([[3.0, 0.01], [0.0, 0.0], [-4.0, 0.02], [0.0, 0.0]])
    left["m"].grad = gradient.clone()
    ColumnAdam(left, {"m": 0.5}).step(1.0)
    for column in range(2):
        moved, wanted = -left["m"][:, column], gradient[:, column]
        torch.testing.assert_close(moved / moved.norm(), wanted / wanted.norm())
        assert (
            abs(float(moved.square().mean().sqrt()) - 0.5) < 1e-5
        )  # the size of a step does not depend on the gradient's


def test_resumed_steps_equal_uninterrupted_ones() -> None:
    def gradient(step: int) -> torch.Tensor:
        return torch.randn(5, 3, generator=torch.Generator().manual_seed(step))

    straight = {"m": torch.ones(5, 3)}
    optimiser = ColumnAdam(straight, {"m": 0.1})
    for step in range(6):
        if step == 3:
            kept = {name: value.clone() for name, value in optimiser.state().items()}
        straight["m"].grad = gradient(step)
        optimiser.step(1.0)
    resumed = {"m": torch.zeros(5, 3)}
    again = ColumnAdam(resumed, {"m": 0.1})
    again.load(kept)
    for step in range(again.count, 6):
        resumed["m"].grad = gradient(step)
        again.step(1.0)
    assert torch.equal(straight["m"], resumed["m"])


def test_drift_is_the_relative_change_of_outputs_to_keep() -> None:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    text, retain, weight, left, right = draw(50, 6), draw(7, 6), draw(4, 6), draw(4, 3), draw(3, 6)
    update = left @ right
    wanted = (text @ update.T).square().sum() / (text @ weight.T).square().sum()
    wanted += (retain @ update.T).square().sum() / (retain @ weight.T).square().sum()
    energy = drift_energy(right, weight, text.T @ text / len(text), retain).double()
    torch.testing.assert_close(((left @ energy) * left).sum(), wanted, rtol=1e-5, atol=0)


def test_a_step_is_measured_in_the_whole_change() -> None:
    left, keys = torch.full((3, 2), 2.0), torch.eye(2)
    assert step_unit(left, 0.1 * torch.eye(2), keys) == 2.0 / float(torch.tensor(0.1))
    assert step_unit(left, torch.eye(2), keys) == 2.0


def test_first_of_each_run() -> None:
    assert first_of(torch.tensor([0, 0, 1, 3, 3, 3])).tolist() == [0, 2, 3]
