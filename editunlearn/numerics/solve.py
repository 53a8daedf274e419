"""Closed-form edits in their dual form: one Cholesky factor per layer, then systems of the size of the batch.

Every locate-then-edit method writes ``dW = R^T B`` with residuals ``R`` (n, d_out) and *recognisers* ``B`` (n, d_in),
one row a fact. A recogniser answers about 1 to its own key and about 0 to what must be preserved. The methods differ in
``B`` alone:

* MEMIT (arXiv 2210.07229, eq. 14): ``B = (I + K Z)^-1 Z^T`` with ``Z = A^-1 K^T``
* EMMET (arXiv 2403.14236, eq. 10): the same with ``ridge * I``; ridge 0 keeps the equality constraint exactly
* ROME (arXiv 2202.05262, eq. 2): n = 1, ridge 0
* AlphaEdit (arXiv 2410.02355, eq. 14): keys projected to the null space first, no ``A`` but ``l2 * I``

``A = w C + mu K_r^T K_r`` holds what is preserved: generic text through ``C``, named facts through their keys ``K_r``.
All rows are keys: ``K`` is (n, d_in), the transpose of the papers' notation. Everything is computed in float64, or
refined to it, on the device of a :class:`Route`; keys come to it, and what is found goes back, a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from editunlearn.numerics.projector import Projector
from editunlearn.numerics.refined import Refined
from editunlearn.numerics.route import CPU, Route

JITTER = 1e-10
"""Added to the diagonal of ``A`` relative to its mean, so that a moment of few tokens still has a Cholesky factor."""

JITTERS = (JITTER, 1e-8, 1e-6, 1e-4)
"""What is tried, one after the other."""

DEPENDENT = 1e-12
"""Keys are dependent when less than this share of one's squared length is its own (equal keys differ by rounding)."""


def preservation(
    moment: Tensor | None,
    weight: float,
    retain: Tensor | None = None,
    retain_weight: float = 0.0,
    *,
    dim: int = 0,
    route: Route = CPU,
) -> Tensor:
    """``A = weight * C + retain_weight * K_r^T K_r``, (d, d) float64 on the route's device.

    Args:
        moment: ``C`` (d, d); None stands for the identity (no second moment).
        weight: how many tokens of generic text ``C`` counts for.
        retain: keys of facts to keep, (m, d), or None.
        retain_weight: how often each of them counts.
        dim: d, needed when ``moment`` is None.
    """
    if moment is not None:
        system = moment.to(route.device, torch.float64, copy=True).mul_(weight)
    else:
        system = torch.eye(dim, dtype=torch.float64, device=route.device)
    if retain is not None and len(retain) and retain_weight > 0:
        route.add_squares(system, retain, retain_weight)
    return system


def compact(rows: Tensor) -> Tensor:
    """At most as many rows as there are columns, with the same ``K^T K``: all that matters of keys to preserve.

    Args:
        rows: (m, d); returned as they are when m <= d.
    """
    if len(rows) <= rows.shape[1]:
        return rows
    upper: Tensor = torch.linalg.qr(rows.double(), mode="r").R
    return upper.to(rows.dtype)


class Preserved(Protocol):
    """The preservation term ``A``, ready to be solved with."""

    def solve(self, rows: Tensor) -> Tensor:
        """``rows A^-1`` for ``rows`` (n, d) float64."""


@dataclass(frozen=True)
class Factor:
    """``A`` by its lower Cholesky factor (d, d)."""

    lower: Tensor

    def solve(self, rows: Tensor) -> Tensor:
        """See :class:`Preserved`."""
        return torch.cholesky_solve(rows.T, self.lower).T


class Inverse:
    """``A = w C + F^T F`` by the inverse of ``C``, found once, and an update of the size of ``F`` (Woodbury).

    With few rows a product with the inverse is several times faster than two triangular solves.

    Args:
        inverse: of ``C``, (d, d) float64, see :func:`inverse`.
        weight: ``w``.
        added: ``F`` (f, d), or None.
    """

    def __init__(self, inverse: Tensor, weight: float, added: Tensor | None = None) -> None:
        self.inverse, self.weight = inverse, weight
        self.added = added.to(inverse) if added is not None and len(added) else None
        if self.added is not None:
            self._solved = self._plain(self.added)
            inner = self.added @ self._solved.T
            inner.diagonal().add_(1.0)
            self._inner = _factor_spd((inner + inner.T) / 2)

    def _plain(self, rows: Tensor) -> Tensor:
        # Few rows are multiplied fastest in whole registers and by a transposed matrix, which this one is as well:
        # 16 rows take two thirds of the time of 10.
        whole = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % 16))
        return torch.nn.functional.linear(whole, self.inverse)[: len(rows)] / self.weight

    def solve(self, rows: Tensor) -> Tensor:
        """See :class:`Preserved`."""
        found = self._plain(rows)
        if self.added is None:
            return found
        return found - self._inner.solve(found @ self.added.T) @ self._solved


def inverse(moment: Tensor) -> Tensor:
    """``C^-1`` (d, d) float64, with the jitter of :func:`factor`; raises what that raises."""
    if not torch.isfinite(moment).all():
        raise ValueError("the second moment is not finite")
    return torch.cholesky_inverse(cholesky(moment.to(torch.float64, copy=True)).lower)


def factor(system: Tensor, route: Route = CPU, right: int = 0) -> Preserved:
    """A positive semidefinite ``system`` (d, d) float64 on the route's device, with a relative jitter, to solve with.

    Args:
        right: how many right-hand sides there will be.

    Raises:
        ValueError: not positive definite even with 1e-4 of its mean diagonal added, or not finite.
    """
    if not torch.isfinite(system).all():
        raise ValueError("the preservation term is not finite")
    if not route.refined(len(system), right):
        return cholesky(system)
    shifted, before = system.clone(), system.diagonal().clone()
    shifted.diagonal().add_(JITTER * before.mean())

    def exact() -> Callable[[Tensor], Tensor]:
        shifted.diagonal().copy_(before)
        return cholesky(shifted).solve

    return Refined(shifted, exact, route.tell)


def cholesky(system: Tensor) -> Factor:
    """Float64 Cholesky factor of a finite ``system`` with a relative jitter; raises what :func:`factor` raises."""
    before, mean = system.diagonal().clone(), float(system.diagonal().mean())
    try:
        for jitter in JITTERS:
            # On the diagonal itself, which is put back: copies of a wide layer's system are gigabytes.
            system.diagonal().copy_(before + jitter * mean)
            lower: Tensor
            lower, info = torch.linalg.cholesky_ex(system)
            if int(info) == 0:
                return Factor(lower)
    finally:
        system.diagonal().copy_(before)
    raise ValueError("the preservation term is not positive definite; measure the second moment on more text")


def recognisers(
    keys: Tensor, preserved: Preserved, ridge: float, most: float | None = None, route: Route = CPU
) -> Tensor:
    """``B = (ridge * I + K Z)^-1 Z^T`` with ``Z = A^-1 K^T``.

    MEMIT is ridge 1, EMMET a small one, ROME one key and ridge 0.

    Args:
        keys: ``K`` (n, d_in).
        preserved: ``A``, on the route's device.
        ridge: lambda >= 0.
        most: limit of the system's condition number, None for none.

    Returns:
        (n, d_in) float64. ``B @ K^T`` is ``I - ridge * (ridge * I + K Z)^-1``.

    Raises:
        ValueError: ridge 0 with linearly dependent keys, or a condition number above ``most``.
    """
    solved = route.each(keys, preserved.solve)
    system = route.products(keys, solved)
    system.diagonal().add_(ridge)
    return _solve_spd(system, solved, exact=ridge == 0, most=most, route=route)


def recognisers_of_many(
    keys: Tensor, system: Tensor, ridge: float, most: float | None = None, route: Route = CPU
) -> Tensor:
    """:func:`recognisers` for more keys than dimensions: ``B = K (ridge * A + K^T K)^-1``, of the size of ``A``.

    Args:
        keys: ``K`` (n, d_in).
        system: ``A`` (d_in, d_in), on the route's device.
        ridge: lambda > 0.
        most: limit of the condition number of the system of :func:`recognisers`, None for none.

    Returns:
        (n, d_in) float64.

    Raises:
        ValueError: ``A`` is not positive definite, or not finite, or the condition number is above ``most``.
    """
    found = route.each(keys, factor(route.add_squares(ridge * system, keys), route, len(keys)).solve)
    # With more keys than dimensions the smallest eigenvalue there is lambda, and the largest at least
    # lambda / (1 - h) for each key's answer h to itself.
    own = float((found * keys).sum(-1).max())
    check_condition(1 / max(1 - own, 1e-30), most)
    return found


def _solve_spd(
    system: Tensor, right: Tensor, *, exact: bool = False, most: float | None = None, route: Route = CPU
) -> Tensor:
    """``system^-1 right``; ``exact``: nothing was added to the diagonal, so that rounding may hide dependent keys.

    The factor is float64 on every device: its numbers are what the limits look at.
    """
    lower = _factor_spd((system + system.T) / 2, exact=exact).lower
    # The squared ratio of the factor's diagonal never exceeds the condition number, and costs nothing.
    check_condition(float((lower.diagonal().max() / lower.diagonal().min()) ** 2) if len(lower) else 1.0, most)
    return route.each(right.T, lambda columns: torch.cholesky_solve(columns.T, lower).T).T


def _factor_spd(system: Tensor, *, exact: bool = False) -> Factor:
    lower, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0 or (exact and bool((lower.diagonal() ** 2 < DEPENDENT * system.diagonal()).any())):
        raise ValueError(
            "the keys of the batch are linearly dependent: two facts share a subject, "
            "or there are more facts than dimensions"
        )
    return Factor(lower)


def check_condition(found: float, most: float | None) -> None:
    """Raises ValueError when a condition number, or a lower bound of it, is above ``most``; None: no limit."""
    if most is not None and not found <= most:
        raise ValueError(
            f"the condition number of the solve is at least {found:.2g}, above limits.condition ({most:g}): facts "
            "whose keys are nearly alike. Leave one of them out, or let them share a value (merge)"
        )


def rank_one(mean_keys: Tensor, keys: Tensor, preserved: Preserved, route: Route = CPU) -> Tensor:
    """ROME's recognisers ``u^T / (u^T k)`` with ``u = A^-1 k_mean``, each found alone, (n, d_in).

    R-ROME is ``keys = mean_keys``; the original takes ``k_mean`` over contexts and ``k`` of the bare prompt.

    Args:
        mean_keys, keys: (n, d_in).
    """
    directions = route.each(mean_keys, preserved.solve)
    return directions / (directions * keys).sum(1, keepdim=True)


def sequential_residuals(residuals: Tensor, rows: Tensor, keys: Tensor, most: float | None = None) -> Tensor:
    """Residuals of edits that are written one after the other, each on the weights that the earlier ones left.

    Args:
        residuals: wanted change of the output for each key, (n, d_out).
        rows: recognisers, each found alone, (n, d_in).
        keys: (n, d_in).
        most: limit of the system's condition number, None for none.

    Returns:
        ``R`` (n, d_out) with ``R_i = residuals_i - sum_{j<i} (B_j . k_i) R_j``.

    Raises:
        ValueError: the condition number (in the 1-norm) is above ``most``.
    """
    cross = (keys.double() @ rows.double().T).tril(-1)
    eye = torch.eye(len(keys), dtype=torch.float64, device=keys.device)
    system: Tensor = eye + cross
    if most is not None:
        check_condition(float(torch.linalg.cond(system, 1)), most)
    found: Tensor = torch.linalg.solve_triangular(system, residuals.double(), upper=False, unitriangular=True)
    return found


def projected_recognisers(
    keys: Tensor,
    project: Projector,
    l2: float,
    fixed: Tensor | None = None,
    moment: Tensor | None = None,
    most: float | None = None,
    route: Route = CPU,
) -> Tensor:
    """AlphaEdit's rows: ``B = [(P (K^T K + F^T F + M) P + l2 I)^-1 P K^T]^T``, (n, d_in).

    Args:
        keys: ``K`` (n, d_in).
        project: ``P``, off the directions that must not change; its basis is on the route's device.
        l2: > 0.
        fixed: ``F`` (f, d_in), keys whose output must stay: those of earlier edits and of retained facts, or None.
        moment: ``M`` (d_in, d_in), weighted second moment of text that counts in the free directions too, on the
            route's device; None for 0, as published.
        most: limit of the system's condition number, None for none.

    Without ``M`` the smaller of the two equivalent systems is solved: (n + f) square, or d_in square when there are
    more keys than dimensions.
    """
    new = route.each(keys, project)
    held = route.each(fixed, project) if fixed is not None and len(fixed) else new[:0]
    both = torch.cat([held, new])
    rows, dim = both.shape
    if moment is None and rows <= dim:
        system = route.products(both, both)
        system.diagonal().add_(l2)
        return _solve_spd(system, both, most=most, route=route)[len(held) :]
    if moment is None:
        system = torch.zeros(dim, dim, dtype=torch.float64, device=route.device)
    else:
        system = project(project(moment.double()).T)
    route.add_squares(system, both)
    system.diagonal().add_(l2)
    return _solve_spd(system, new.T, most=most, route=route).T
