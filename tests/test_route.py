"""Solves on a device: float32 refined to float64, keys in pieces, and which of them is chosen."""

from __future__ import annotations

import pytest
import torch
from edits import relative, request, settings
from torch import Tensor

from editunlearn import editors
from editunlearn.numerics import refined, route, solve
from editunlearn.numerics.projector import null_space
from editunlearn.numerics.route import Route

WIDTH = 96
REFINED = Route(precision="refined")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(condition: float, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Positive definite, eigenvalues evenly spaced in their logarithm."""
    basis = torch.linalg.qr(normal(seed, WIDTH, WIDTH))[0]
    exponents = torch.linspace(0, -torch.tensor(condition).log10().item(), WIDTH, dtype=torch.float64)
    made: Tensor = (basis * (scale * 10**exponents)) @ basis.T
    return (made + made.T) / 2


def solved(matrix: Tensor, how: Route, keys: Tensor, ridge: float = 1.0) -> tuple[Tensor, list[str]]:
    said: list[str] = []
    how = Route(how.device, how.precision, said.append, how.rows)
    return solve.recognisers(keys, solve.factor(matrix, how, len(keys)), ridge, route=how), said


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("ridge", [1.0, 0.0])
def test_refined_equals_float64(condition: float, scale: float, ridge: float) -> None:
    matrix, keys = system(condition, scale=scale), normal(1, 7, WIDTH)
    exact, _ = solved(matrix, Route(), keys, ridge)
    ours, said = solved(matrix, REFINED, keys, ridge)
    assert said == []
    assert relative(ours, exact) < 1e-8


def test_float32_alone_would_not_do() -> None:
    matrix, keys = system(1e6), normal(1, 7, WIDTH)
    plain = torch.cholesky_solve(keys.float().T, torch.linalg.cholesky(matrix.float())).T.double()
    assert relative(plain, solve.factor(matrix).solve(keys)) > 1e-4
    assert relative(solve.factor(matrix, REFINED).solve(keys), solve.factor(matrix).solve(keys)) < 1e-8


@pytest.mark.parametrize("condition", [1e12, 1e18])
def test_what_is_too_ill_conditioned_is_solved_in_float64_and_said(condition: float) -> None:
    matrix, keys = system(condition), normal(1, 7, WIDTH)
    exact, _ = solved(matrix, Route(), keys)
    ours, said = solved(matrix, REFINED, keys)
    if said:
        assert "is solved in float64" in said[0] and len(said) == 1
        assert torch.equal(ours, exact)  # the very same system, its jitter too
    else:
        assert relative(ours, exact) < 1e-3
    assert said or condition < 1e15


def test_too_few_steps_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refined, "STEPS", 2)
    matrix, keys, said = system(1e8), normal(1, 7, WIDTH), list[str]()
    term = solve.factor(matrix, Route(precision="refined", tell=said.append))
    for part in keys.split(3):
        assert torch.equal(term.solve(part), solve.factor(matrix).solve(part))
    assert len(said) == 1 and "steps did not refine it" in said[0]


def test_what_float32_cannot_factor_goes_to_float64_and_its_errors() -> None:
    indefinite = torch.eye(WIDTH, dtype=torch.float64)
    indefinite[0, 0] = -1.0
    with pytest.raises(ValueError, match="not positive definite"):
        solve.factor(indefinite, REFINED).solve(normal(0, 2, WIDTH))
    with pytest.raises(ValueError, match="not finite"):
        solve.factor(indefinite * torch.nan, REFINED)


def test_rows_of_very_different_size_and_zeros() -> None:
    matrix, keys = system(1e5), normal(1, 4, WIDTH) * torch.tensor([[1e-12], [0.0], [1.0], [1e12]])
    exact, ours = solve.factor(matrix).solve(keys), solve.factor(matrix, REFINED).solve(keys)
    assert torch.equal(ours[1], torch.zeros(WIDTH, dtype=torch.float64))
    for row in (0, 2, 3):
        assert relative(ours[row], exact[row]) < 1e-8


def test_a_system_is_left_as_it_was() -> None:
    matrix = system(1e3)
    before = matrix.clone()
    solve.factor(matrix).solve(normal(0, 2, WIDTH))
    solve.factor(matrix, REFINED).solve(normal(0, 2, WIDTH))
    with pytest.raises(ValueError, match="positive definite"):
        solve.factor(matrix.neg_())
    assert torch.equal(matrix, -before)


@pytest.mark.parametrize("precision", ["float64", "refined"])
@pytest.mark.parametrize("n", [1, 10, 33, 130])
def test_keys_in_pieces(n: int, precision: route.Precision) -> None:
    """More keys than are on the device at one time, and than the layer is wide."""
    matrix, keys, fixed = system(1e3), normal(1, n, WIDTH).float(), normal(2, 20, WIDTH).float()
    whole, pieces = Route(), Route(precision=precision, rows=8)
    if n <= WIDTH:
        one = solve.recognisers(keys, solve.factor(matrix), 1.0)
        other = solve.recognisers(keys, solve.factor(matrix, pieces), 1.0, route=pieces)
    else:
        one = solve.recognisers_of_many(keys, matrix, 1.0)
        other = solve.recognisers_of_many(keys, matrix, 1.0, route=pieces)
    assert relative(other, one) < 1e-9
    project = null_space(matrix, 0.02)
    for moment in (None, 3 * matrix):
        one, other = (solve.projected_recognisers(keys, project, 0.5, fixed, moment, route=r) for r in (whole, pieces))
        assert relative(other, one) < 1e-9
    one, other = (solve.preservation(matrix, 2.0, keys, 3.0, route=r) for r in (whole, pieces))
    assert relative(other, one) < 1e-12


def test_no_more_than_a_piece_is_on_the_device() -> None:
    seen: list[int] = []

    class Watched(Route):
        def pieces(self, rows: Tensor):  # type: ignore[no-untyped-def]
            for part in super().pieces(rows):
                seen.append(len(part))
                yield part

    how = Watched(rows=16)
    solve.recognisers(normal(0, 90, WIDTH), solve.factor(system(10.0)), 1.0, route=how)
    assert max(seen) == 16 and sum(seen) >= 2 * 90


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Route(torch.device("cuda"))
    capability = {"is": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability["is"])
    assert not gpu.refined(14336, 1)  # a data centre's
    capability["is"] = (8, 9)
    assert gpu.refined(14336, 100) and not gpu.refined(14336, 1000)
    assert not Route().refined(14336, 1)
    assert Route(precision="refined").refined(10, 10)
    assert not Route(torch.device("cuda"), "float64").refined(14336, 1)
    assert Route().keeps_inverses and not gpu.keeps_inverses and not REFINED.keeps_inverses
    assert route.able(torch.device("mps")).type == "cpu" and route.able(torch.device("cuda:1")).index == 1


@pytest.mark.parametrize("method", ["memit", "emmet", "rome", "r_rome", "alphaedit"])
def test_a_whole_edit_is_the_same(method: str, text: str) -> None:
    import tiny

    few = (0,) if method in ("rome", "r_rome") else (0, 1, 2)
    found = [
        editors.fit(tiny.lm(), request(few), settings(method, text, f"solve.precision={precision}", "refine=null"))
        for precision in ("float64", "refined")
    ]
    one, other = ({name: f.left.double() @ f.right.double() for name, f in delta.factors.items()} for delta in found)
    for name in one:
        assert relative(other[name], one[name]) < 1e-5
