"""Conjugate gradients, plain or preconditioned."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_trak.checks import positive, real, require_one_of
from lightning_trak.methods.influence.ekfac_preconditioner import ekfac_preconditioner
from lightning_trak.methods.influence.hessian import Convergence, Hessian
from lightning_trak.methods.influence.landmark_preconditioner import landmark_preconditioner
from lightning_trak.methods.influence.score_error import ROUGH, large_score_error
from lightning_trak.methods.influence.solvers import INDEFINITE, InverseProduct, Solver

_PRECONDITIONERS = {"landmarks": landmark_preconditioner, "ekfac": ekfac_preconditioner}
_DRIFT = 10  # by this factor, rounding may leave a solution worse than the iterations say


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients (Hestenes and Stiefel 1952; Martens 2010 for networks): all targets at once.

    With a preconditioner M, the iterations work on M^-1 (H + lambda I), whose eigenvalues lie closer together, so that
    fewer are needed (Saad 2003, Iterative Methods for Sparse Linear Systems, algorithm 9.1). The solution is the same.
    It is fitted once for each checkpoint:

    - ``"landmarks"``: the Gauss-Newton matrix of at most 512 training examples, those that carry most of it, see
      :mod:`~lightning_trak.methods.influence.landmark_preconditioner`. Keeps their gradients, a gibibyte at
      most. Best where there are more weights than examples, or few examples carry the curvature.
    - ``"ekfac"``: EK-FAC, see :mod:`~lightning_trak.methods.influence.ekfac_preconditioner`. Two passes
      over the training data. Helps where there are many more examples than weights; where there are fewer, it takes
      more iterations than none, because EK-FAC sees curvature in directions that no example has.

    Residuals are in the norm of M^-1, sqrt(r^T M^-1 r), relative to the target's gradient; without a preconditioner,
    M is the identity. When the iterations end, the residual is computed afresh from the solution. It is in the
    ``convergence`` of :class:`~lightning_trak.methods.InfluenceFunction`, and in a log line. Where the damping is so
    small that scores may be off by more than 2% even with this residual, they are compared with better ones, by five
    more passes, and a warning says if they are.

    Args:
        max_iterations: passes over the training data, at most, for a block of targets.
        tolerance: stop when the residual is this small.
        preconditioner: ``"landmarks"``, ``"ekfac"``, or None for plain conjugate gradients.
        strict: whether it is an error if the tolerance is not reached or scores are off, rather than a warning.
    """

    max_iterations: int = 100
    tolerance: float = 1e-4
    preconditioner: Literal["landmarks", "ekfac"] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        positive("max_iterations", self.max_iterations)
        if not 0 < real("tolerance", self.tolerance) < 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {self.tolerance!r}")
        if self.preconditioner is not None:
            require_one_of("preconditioner", self.preconditioner, tuple(_PRECONDITIONERS))

    def prepare(self, hessian: Hessian) -> InverseProduct:
        """Fit the preconditioner.

        Raises:
            ValueError: from the function that is returned: if the matrix is not positive definite, or, with
                ``strict``, the tolerance is not reached or scores are off.
        """
        precondition = _PRECONDITIONERS[self.preconditioner](hessian) if self.preconditioner else torch.clone
        return lambda rows, targets: self._solve(hessian, precondition, rows, targets)

    def _solve(
        self, hessian: Hessian, precondition: Callable[[Tensor], Tensor], rows: Tensor, targets: range
    ) -> Tensor:
        solution, residual, direction = torch.zeros_like(rows), rows.clone(), precondition(rows)
        start = squared = _inner(rows, direction)
        goal = self.tolerance**2 * start
        iterations = torch.zeros(len(rows), dtype=torch.int64)
        for _ in range(self.max_iterations):
            active = (~(squared <= goal)).flatten().nonzero().flatten()
            if len(active) == 0:
                break
            along = direction[active]
            product = hessian.damped_product(along)
            bend = _inner(along, product)
            if not bend.min() > 0:
                worst = float((bend / _inner(along, along)).min())
                singular = "it is singular to rounding; use a larger damping, or Trainer(precision='64-true')"
                raise ValueError(
                    f"conjugate gradients at {hessian.passes.where} found a direction in which the damped Hessian is"
                    f" {worst:.3g}, so it is not positive definite:"
                    f" {INDEFINITE if hessian.curvature == 'exact' else singular}"
                )
            step = squared[active] / bend
            solution[active] += step.to(rows) * along
            residual[active] -= step.to(rows) * product
            preconditioned = precondition(residual[active])
            before, squared = squared, squared.clone()
            squared[active] = _inner(residual[active], preconditioned)
            direction[active] = preconditioned + (squared[active] / before[active]).to(rows) * along
            iterations[active.cpu()] += 1
        left = rows - hessian.damped_product(solution)
        relative = _inner(left, precondition(left)) / start.clamp_min(torch.finfo(start.dtype).tiny)
        residuals = relative.sqrt().flatten().cpu()  # not a number where the preconditioner is not positive
        stopped = (~(squared <= goal)).flatten().cpu()
        found = Convergence(hessian.passes.where, targets, iterations, residuals)
        if self._report(found, hessian, stopped):
            error = large_score_error(hessian, rows, solution, left, ROUGH)
            if error is not None:
                self._complain(
                    f"{error.message}, because the damped Hessian is ill-conditioned: use a larger damping, or"
                    " a smaller tolerance with Trainer(precision='64-true')"
                )
        return solution

    def _report(self, found: Convergence, hessian: Hessian, stopped: Tensor) -> bool:
        """Log how the iterations went, and return whether the tolerance was reached. If not, warn or raise."""
        hessian.convergence.append(found)
        rank_zero_info(f"conjugate gradients at {found}")
        allowed = torch.where(stopped, 0.0, _DRIFT * self.tolerance)
        bad = (~(found.residuals <= allowed)).nonzero().flatten()
        if len(bad) == 0:
            return True
        worst = int(bad[found.residuals[bad].argmax()])
        more = f" ({len(bad)} targets in all)" if len(bad) > 1 else ""
        what = (
            f"stopped after {self.max_iterations} iterations" if stopped[worst] else "ended where rounding leaves them"
        )
        advice = "more max_iterations or a larger damping" if stopped[worst] else "precision='64-true' or more damping"
        plain = "" if self.preconditioner or not stopped[worst] else ", or preconditioner='landmarks'"
        self._complain(
            f"conjugate gradients at {found.where} {what} at a relative residual of"
            f" {float(found.residuals[worst]):.2g} for target {found.targets[worst]}{more}, above"
            f" {self.tolerance:g}: use {advice}{plain}"
        )
        return False

    def _complain(self, message: str) -> None:
        """Warn, or raise if strict."""
        if self.strict:
            raise ValueError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows in float64, shape ``(n, 1)``."""
    return (left.double() * right.double()).sum(1, keepdim=True)
