"""Positive definite systems by a float32 factor, refined to float64: for devices whose float64 is slow.

The factor is the preconditioner of conjugate gradients whose products and sums are float64. Where the factor is good
this is iterative refinement, several digits in each step; where the matrix is too ill-conditioned for float32 it takes
more steps, and beyond :data:`STEPS` it is given up. (Carson and Higham, SIAM J. Sci. Comput. 40, 2018, have the same
with GMRES.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-8
"""Largest error in the energy norm (``sqrt(e A e)``), relative to the solution's, by its usual estimate. Float64 itself
has errors of that size from condition numbers of 1e8 on."""
STEP_TOLERANCE = 1e-10
"""The same for the steps of one attempt, whose residual is not computed anew."""
STEPS = 40
"""Most steps of one attempt; with more, float64 from the start is cheaper even where it is slow."""
ATTEMPTS = 2
"""Times that the residual is computed anew and gone on from."""
DELAY = 2
"""Steps whose shares of the energy must be small for the rest to count as small."""
SHIFTS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4)
"""Added to the unit diagonal of the scaled matrix, until float32 can factor it."""


class Refined:
    """``A`` by a float32 Cholesky factor of it, scaled to a unit diagonal, and itself.

    Args:
        system: ``A`` (d, d) float64.
        exact: solves with ``A`` in float64; called when float32 does not do.
        tell: called with a sentence then.
    """

    def __init__(
        self, system: Tensor, exact: Callable[[], Callable[[Tensor], Tensor]], tell: Callable[[str], None]
    ) -> None:
        self.system, self._exact, self._tell = system, exact, tell
        self._fallback: Callable[[Tensor], Tensor] | None = None
        self.lower: Tensor | None = None
        self.steps = 0
        diagonal = system.diagonal()
        if bool((diagonal > 0).all()):
            self._scale = diagonal.rsqrt()
            self.lower = _factor32(system, self._scale)

    def solve(self, rows: Tensor) -> Tensor:
        """``rows A^-1`` for ``rows`` (n, d) float64."""
        if self._fallback is None:
            found = self._refine(rows) if self.lower is not None else None
            if found is not None:
                return found
            why = "float32 cannot factor it" if self.lower is None else f"{self.steps} steps did not refine it"
            self._tell(f"a system of {len(self.system):,} is solved in float64: {why} to {TOLERANCE:g}")
            self.lower = None
            self._fallback = self._exact()
        return self._fallback(rows)

    def _refine(self, rows: Tensor) -> Tensor | None:
        """The solution, None when it does not converge."""
        found, residual, energy = torch.zeros_like(rows), rows.clone(), None
        for _ in range(ATTEMPTS):
            gained = self._conjugate_gradients(found, residual)
            if gained is None:
                return None
            energy = gained if energy is None else energy
            residual = rows - found @ self.system
            left = (residual * self._approximate(residual)).sum(1)
            if bool((left <= TOLERANCE**2 * energy).all()):
                return found
        return None

    def _conjugate_gradients(self, found: Tensor, residual: Tensor) -> Tensor | None:
        """Add to ``found`` what solves for ``residual``, both changed in place; returns the energy (n,) that was added.

        None when it does not converge, or the matrix is not positive definite.
        """
        shares: list[Tensor] = []
        direction = torch.zeros_like(found)
        before = torch.ones(len(found), dtype=found.dtype, device=found.device)
        energy = torch.zeros_like(before)
        for _ in range(STEPS):
            self.steps += 1
            solved = self._approximate(residual)
            now = (residual * solved).sum(1)
            direction.mul_((now / before)[:, None]).add_(solved)
            step = direction @ self.system
            curvature = (direction * step).sum(1)
            moving = now > 0  # a row that is solved exactly stands still
            if not bool((curvature[moving] > 0).all()) or not bool(torch.isfinite(curvature).all()):
                return None
            length = torch.where(moving, now / curvature.clamp(min=torch.finfo(now.dtype).tiny), 0.0)
            found.addcmul_(length[:, None], direction)
            residual.addcmul_(length[:, None], step, value=-1)
            shares.append(length * now)
            energy += shares[-1]
            if len(shares) >= DELAY and bool((torch.stack(shares[-DELAY:]).sum(0) <= STEP_TOLERANCE**2 * energy).all()):
                return energy
            before = torch.where(moving, now, 1.0)
        return None

    def _approximate(self, rows: Tensor) -> Tensor:
        """``rows A^-1`` to float32's precision."""
        assert self.lower is not None  # noqa: S101 - otherwise nothing is refined
        size = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)  # small residuals stay normal
        scaled = (rows / size * self._scale).float()
        found: Tensor = torch.cholesky_solve(scaled.T, self.lower).T.double() * self._scale * size
        return found


def _factor32(system: Tensor, scale: Tensor) -> Tensor | None:
    """Lower Cholesky factor (d, d) float32 of the scaled matrix, None when there is none."""
    narrow = system.float().mul_(scale.float()).mul_(scale.float()[:, None])
    for before, shift in zip((0.0, *SHIFTS), SHIFTS, strict=False):
        narrow.diagonal().add_(shift - before)
        lower: Tensor
        lower, info = torch.linalg.cholesky_ex(narrow)
        if int(info) == 0:
            return lower
    return None
