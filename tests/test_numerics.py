"""Every fast solver against the literal equations in ``reference``, and the algebra that ties the methods together."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor

from editunlearn.numerics import moments, solve
from editunlearn.numerics.moments import SecondMoment
from editunlearn.numerics.projector import null_space

IN, OUT = 24, 10
SEEDS = range(5)
COUNTS = (1, 5, 23, 40)  # one fact, fewer and more than the dimensions


class Random:
    """A random problem in rows (ours); ``.T`` is the papers' notation."""

    def __init__(self, seed: int, n: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        # well conditioned: the jitter, 1e-10 of the mean eigenvalue, must stay below the tolerance
        mix = torch.linalg.qr(self.normal(IN, IN))[0] * torch.logspace(-0.4, 0.4, IN, dtype=torch.float64)
        self.moment = SecondMoment(IN)
        self.moment.add(self.normal(300, IN) @ mix)
        self.c = self.moment.mean()
        self.keys = self.normal(n, IN) @ mix
        self.bare = self.keys + 0.1 * self.normal(n, IN)
        self.residuals = self.normal(n, OUT)
        self.retain = self.normal(6, IN) @ mix
        self.past = self.normal(4, IN) @ mix
        self.weight = self.normal(OUT, IN)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-8) -> None:
    assert ours.dtype == theirs.dtype == torch.float64 and ours.shape == theirs.shape
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


def preserved(p: Random, retain: bool, past: bool, weight: float = 30.0, mu: float = 3.0) -> tuple[Tensor, Tensor]:
    """(ours, theirs) of w C + mu K_r K_r^T + K_p K_p^T."""
    ours = solve.preservation(p.c, weight, p.retain if retain else None, mu)
    theirs = reference.preserved(p.c, weight, p.retain.T if retain else None, mu)
    if past:
        ours = ours + p.past.T @ p.past
        theirs = theirs + p.past.T @ p.past
    return ours, theirs


# --- solvers


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize(("retain", "past"), [(False, False), (True, False), (True, True)])
def test_memit(seed: int, n: int, retain: bool, past: bool) -> None:
    p = Random(seed, n)
    ours, theirs = preserved(p, retain, past)
    rows = solve.recognisers(p.keys, solve.factor(ours), 1.0)
    close(p.residuals.T @ rows, reference.memit_update(theirs, p.keys.T, p.residuals.T))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "ridge"), [(1, 0.0), (5, 0.0), (5, 0.1), (23, 0.1), (40, 0.1), (5, 7.0)])
@pytest.mark.parametrize(("retain", "past"), [(False, False), (True, True)])
def test_emmet(seed: int, n: int, ridge: float, retain: bool, past: bool) -> None:
    p = Random(seed, n)
    ours, theirs = preserved(p, retain, past)
    rows = solve.recognisers(p.keys, solve.factor(ours), ridge)
    close(p.residuals.T @ rows, reference.emmet_update(theirs, p.keys.T, p.residuals.T, ridge), 1e-7)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("retain", "past"), [(False, False), (True, True)])
@pytest.mark.parametrize("consistent", [False, True])
def test_rome_of_one_fact(seed: int, retain: bool, past: bool, consistent: bool) -> None:
    p = Random(seed, 1)
    ours, theirs = preserved(p, retain, past)
    written = p.keys[0] if consistent else p.bare[0]
    row = solve.rank_one(p.keys[:1], written[None], solve.factor(ours))
    v = p.weight @ written + p.residuals[0]
    if consistent:
        literal = reference.r_rome_update(p.weight, theirs, p.keys[0], v)
    else:
        literal = reference.rome_update(p.weight, theirs, p.keys[0], p.bare[0], v)
    close(torch.outer(p.residuals[0], row[0]), literal)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("consistent", [False, True])
def test_rome_sequence_is_literally_one_after_the_other(seed: int, n: int, consistent: bool) -> None:
    p = Random(seed, n)
    lower = solve.factor(solve.preservation(p.c, 1.0))
    written = p.keys if consistent else p.bare
    rows = solve.rank_one(p.keys, written, lower)
    left = solve.sequential_residuals(p.residuals, rows, written)
    weight = p.weight.clone()
    for mean, key, residual in zip(p.keys, written, p.residuals, strict=True):
        # what is wanted is a change of the output of the unedited weight
        weight += reference.rome_update(weight, p.c, mean, key, p.weight @ key + residual)
    close(left.T @ rows, weight - p.weight, 1e-7)
    assert torch.allclose(weight @ written[-1], (p.weight + left.T @ rows) @ written[-1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("held", [0, 4, 30])
@pytest.mark.parametrize("relative", [True, False])
def test_alphaedit(seed: int, n: int, held: int, relative: bool) -> None:
    p = Random(seed, n)
    spectrum = torch.linalg.eigvalsh(p.c)
    threshold = float(spectrum[12:14].mean())  # in a gap, so that rounding cannot move the cut
    threshold = threshold / float(spectrum.mean()) if relative else threshold
    project = null_space(p.c, threshold, relative=relative)
    assert project.basis.shape == (IN, IN - 13) and project.removes
    fixed = p.normal(held, IN)
    rows = solve.projected_recognisers(p.keys, project, 0.7, fixed)
    literal = reference.null_space_projector(p.c, threshold, relative=relative)
    close(p.residuals.T @ rows, reference.alphaedit_update(literal, p.keys.T, fixed.T, p.residuals.T, 0.7))
    close(project(p.keys), p.keys @ literal)
    if not held:
        close(solve.projected_recognisers(p.keys, project, 0.7), rows, 1e-12)
    # text that counts in the null space is like keys already written whose second moment it is
    written = torch.cat([fixed.T, reference.square_root(2.0 * p.c)], 1)
    rows = solve.projected_recognisers(p.keys, project, 0.7, fixed, 2.0 * p.c)
    close(p.residuals.T @ rows, reference.alphaedit_update(literal, p.keys.T, written, p.residuals.T, 0.7))


# --- algebra


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "ridge"), [(5, 1.0), (24, 0.1), (40, 1.0), (100, 0.3)])
def test_many_keys(seed: int, n: int, ridge: float) -> None:
    p = Random(seed, n)
    ours, theirs = preserved(p, retain=True, past=True)
    rows = solve.recognisers_of_many(p.keys, ours, ridge)
    close(rows, solve.recognisers(p.keys, solve.factor(ours), ridge))
    close(p.residuals.T @ rows, reference.emmet_update(theirs, p.keys.T, p.residuals.T, ridge), 1e-7)


def test_many_keys_are_guarded_as_few_are() -> None:
    p = Random(0, 40)
    system = solve.preservation(p.c, 1e-3)
    dual = torch.eye(40, dtype=torch.float64) + p.keys @ torch.linalg.inv(system) @ p.keys.T
    condition = float(torch.linalg.cond(dual))
    solve.recognisers_of_many(p.keys, system, 1.0, condition)
    with pytest.raises(ValueError, match="the condition number of the solve is at least") as error:
        solve.recognisers_of_many(p.keys, system, 1.0, 2.0)
    assert 2.0 < float(str(error.value).split("at least ")[1].split(",")[0]) <= condition


@pytest.mark.parametrize("seed", SEEDS)
def test_memit_is_emmet_with_ridge_one(seed: int) -> None:
    p = Random(seed, 7)
    close(
        reference.memit_update(p.c, p.keys.T, p.residuals.T),
        reference.emmet_update(p.c, p.keys.T, p.residuals.T, 1.0),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_rome_is_emmet_of_one_fact_without_ridge(seed: int) -> None:
    p = Random(seed, 1)
    lower = solve.factor(p.c)
    close(solve.rank_one(p.keys[:1], p.keys[:1], lower), solve.recognisers(p.keys, lower, 0.0))
    literal = reference.rome_update(p.weight, p.c, p.keys[0], p.keys[0], p.weight @ p.keys[0] + p.residuals[0])
    close(reference.emmet_update(p.c, p.keys.T, p.residuals.T, 0.0), literal)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_ridge_every_value_is_met(seed: int) -> None:
    p = Random(seed, 6)
    rows = solve.recognisers(p.keys, solve.factor(p.c), 0.0)
    close(rows @ p.keys.T, torch.eye(6, dtype=torch.float64))
    ridge = solve.recognisers(p.keys, solve.factor(p.c), 0.3)
    inner = 0.3 * torch.eye(6, dtype=torch.float64) + p.keys @ torch.linalg.inv(p.c) @ p.keys.T
    close(ridge @ p.keys.T, torch.eye(6, dtype=torch.float64) - 0.3 * torch.linalg.inv(inner))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("held", [0, 1, 9, 40])
def test_an_updated_inverse_is_the_factor_of_the_whole(seed: int, held: int) -> None:
    p = Random(seed, 5)
    added = p.normal(held, IN)
    whole = solve.factor(3.0 * p.c + added.T @ added)
    updated = solve.Inverse(solve.inverse(p.c), 3.0, added)
    close(updated.solve(p.keys), whole.solve(p.keys))
    close(solve.recognisers(p.keys, updated, 1.0), solve.recognisers(p.keys, whole, 1.0))


def test_many_rows_are_as_few_with_the_same_products() -> None:
    many = torch.randn(40, 6)
    few = solve.compact(many)
    assert few.shape == (6, 6) and torch.allclose(few.T @ few, many.T @ many, atol=1e-4)
    assert torch.equal(solve.compact(many[:6]), many[:6])


def test_the_scale_of_the_moment_does_not_matter_to_rome() -> None:
    p = Random(0, 1)
    one, many = (solve.rank_one(p.keys[:1], p.bare[:1], solve.factor(solve.preservation(p.c, w))) for w in (1.0, 3e4))
    close(one, many)


def test_alphaedit_leaves_protected_directions_alone() -> None:
    p = Random(0, 5)
    project = null_space(p.c, 0.5)
    rows = solve.projected_recognisers(p.keys, project, 1.0)
    assert float((rows - project(rows)).abs().max()) < 1e-12


def test_retained_keys_change_less() -> None:
    p = Random(0, 3)
    free = solve.recognisers(p.keys, solve.factor(solve.preservation(p.c, 1.0)), 1.0)
    held = solve.recognisers(p.keys, solve.factor(solve.preservation(p.c, 1.0, p.retain, 1e6)), 1.0)
    assert float((held @ p.retain.T).norm()) < 1e-3 * float((free @ p.retain.T).norm())


def test_no_moment_is_the_identity() -> None:
    p = Random(0, 3)
    assert torch.equal(solve.preservation(None, 5.0, dim=IN), torch.eye(IN, dtype=torch.float64))
    row = solve.rank_one(p.keys[:1], p.keys[:1], solve.factor(solve.preservation(None, 1.0, dim=IN)))
    close(row[0], p.keys[0] / p.keys[0].square().sum())


# --- errors


@pytest.mark.parametrize("seed", range(20))
def test_dependent_keys_without_ridge_are_refused(seed: int) -> None:
    p = Random(seed, 4)
    twice = torch.cat([p.keys, p.keys[:1]])
    with pytest.raises(ValueError, match="linearly dependent: two facts share a subject"):
        solve.recognisers(twice, solve.factor(p.c), 0.0)
    assert torch.isfinite(solve.recognisers(twice, solve.factor(p.c), 0.1)).all()


def test_more_exact_constraints_than_dimensions_are_refused() -> None:
    p = Random(0, IN + 3)
    with pytest.raises(ValueError, match="more facts than dimensions"):
        solve.recognisers(p.keys, solve.factor(p.c), 0.0)


def test_preservation_that_is_no_moment_is_refused() -> None:
    p = Random(0, 1)
    broken = p.c.clone()
    broken[2, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        solve.factor(broken)
    with pytest.raises(ValueError, match="not positive definite"):
        solve.factor(-p.c)
    with pytest.raises(ValueError, match="not positive definite"):
        solve.factor(p.c - 2 * p.c.diagonal().mean() * torch.eye(IN, dtype=torch.float64))


def test_a_moment_of_few_tokens_still_has_a_factor() -> None:
    p = Random(0, 3)
    few = SecondMoment(IN)
    few.add(p.normal(5, IN))
    lower = solve.factor(few.mean())
    assert torch.isfinite(solve.recognisers(p.keys, lower, 1.0)).all()


def test_null_space_errors_say_which_way_to_go() -> None:
    p = Random(0, 1)
    with pytest.raises(ValueError, match=r"no null space: all 24 eigenvalues .* relative threshold 1e-09; raise it"):
        null_space(p.c, 1e-9)
    with pytest.raises(ValueError, match="nothing protected: .* absolute threshold 1000000000.0; lower it"):
        null_space(p.c, 1e9, relative=False)


# --- moments and projector


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_streaming_moment_equals_direct(dtype: torch.dtype) -> None:
    rows = torch.randn(500, IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    moment = SecondMoment(IN)
    for part in rows.split(37):
        moment.add(part)
    wide = rows.double()
    assert moment.count == 500
    close(moment.mean(), wide.T @ wide / 500, 1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(moment.mean(), moment.mean().T)
    with pytest.raises(ValueError, match="no rows"):
        SecondMoment(3).mean()


@pytest.mark.parametrize("width", [24, 700, 2100])
@pytest.mark.parametrize("fast", [True, False])
def test_a_moment_of_bfloat16_rows_is_off_by_its_rounding_at_most(
    width: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "fast_bfloat16", lambda _device: fast)
    rows = torch.randn(600, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    moment = SecondMoment(width)
    for part in rows.split(100):
        moment.add(part)
    wide = rows.double()
    direct = wide.T @ wide / 600
    off = float((moment.mean() - direct).norm() / direct.norm())
    assert off < (2**-9 if fast else 1e-6)  # half a bfloat16 step for a single product, less for six
    assert torch.equal(moment.mean(), moment.mean().T)


@pytest.mark.parametrize("threshold", [0.2, 1.5])
def test_projector_is_one(threshold: float) -> None:
    p = Random(0, 9)
    project = null_space(p.c, threshold)
    literal = reference.null_space_projector(p.c, threshold, relative=True)
    assert project.removes == (float(literal.trace()) >= IN / 2) and project.basis.shape[1] <= IN / 2
    once = project(p.keys)
    close(once, p.keys @ literal)
    close(project(once), once, 1e-12)
    close(project.basis.T @ project.basis, torch.eye(project.basis.shape[1], dtype=torch.float64), 1e-12)


def test_a_relative_threshold_does_not_depend_on_the_scale() -> None:
    p = Random(0, 1)
    assert null_space(p.c, 0.5).basis.shape == null_space(1e6 * p.c, 0.5).basis.shape


# --- devices


def test_statistics_and_edits_stay_on_the_device_of_their_rows() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from editunlearn.lm.hooks import low_rank_hook

    with FakeTensorMode(allow_non_fake_inputs=True):  # checks devices without having them
        rows = torch.empty(10, 4, device="cuda", dtype=torch.float16)
        moment = SecondMoment(4)  # as an interrupted run left it
        moment.add(rows)
        assert moment.mean().device.type == "cuda"
        output = low_rank_hook(torch.empty(6, 3), torch.empty(3, 4))(rows, torch.empty(10, 6, device="cuda"))
        assert output.device.type == "cuda"
