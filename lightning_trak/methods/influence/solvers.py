"""Solving with the damped Hessian: directly, or by conjugate gradients."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.scoring.gram import DampedGram

InverseProduct = Callable[[Tensor], Tensor]
"""Takes rows, ``(n, p)``, and returns (H + lambda I)^-1 applied to each."""

INDEFINITE = (
    "these weights are no minimum of the training loss; use a larger damping, or curvature='gauss_newton', which has no"
    " negative eigenvalues"
)


class Solver(ABC):
    """A way to apply the inverse of the damped Hessian."""

    @abstractmethod
    def prepare(self, hessian: Hessian) -> InverseProduct:
        """Do what does not depend on the targets."""


@dataclass(frozen=True)
class Explicit(Solver):
    """Forms H, ``(p, p)`` in float64, and factors it: exact, for small models (Koh and Liang 2017, section 3)."""

    def prepare(self, hessian: Hessian) -> InverseProduct:
        """Factor the matrix.

        Raises:
            ValueError: if it is not positive definite, or singular to the precision of the gradients.
        """
        matrix, ridge, where = hessian.matrix(), hessian.ridge, hessian.passes.where
        mean = float(matrix.diagonal().mean())
        if hessian.curvature == "exact":
            smallest = float(torch.linalg.eigvalsh(matrix)[0])
            if min(mean, smallest + ridge) <= 0:
                relative = len(matrix) / float(hessian.weights.sum())
                raise ValueError(
                    f"the exact Hessian at {where} is not positive definite: with its smallest eigenvalue,"
                    f" {smallest:.3g}, it needs a damping above {-smallest * relative:.3g}, and has"
                    f" {ridge * relative:.3g}; {INDEFINITE}"
                )
        return DampedGram(matrix, ridge / mean, hessian.passes.dtype, where).solve


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients (Hestenes and Stiefel 1952; Martens 2010 for networks): all targets at once.

    Args:
        max_iterations: passes over the training data, at most, for a block of targets.
        tolerance: stop when the residual is this small relative to the target's gradient.
    """

    max_iterations: int = 100
    tolerance: float = 1e-4

    def prepare(self, hessian: Hessian) -> InverseProduct:
        """Nothing: all work depends on the targets."""
        return lambda rows: self._solve(hessian, rows)

    def _solve(self, hessian: Hessian, rows: Tensor) -> Tensor:
        solution, residual, direction = torch.zeros_like(rows), rows.clone(), rows.clone()
        squared = _inner(rows, rows)
        goal = self.tolerance**2 * squared
        for _ in range(self.max_iterations):
            active = (~(squared <= goal)).flatten().nonzero().flatten()
            if len(active) == 0:
                return solution
            along = direction[active]
            product = hessian.damped_product(along)
            bend = _inner(along, product)
            if not bend.min() > 0:
                worst = float((bend / _inner(along, along)).min())
                raise ValueError(
                    f"conjugate gradients at {hessian.passes.where} found a direction in which the damped Hessian is"
                    f" {worst:.3g}, so it is not positive definite: {INDEFINITE}"
                )
            step = squared[active] / bend
            solution[active] += step.to(rows) * along
            residual[active] -= step.to(rows) * product
            before, squared = squared, _inner(residual, residual)
            direction[active] = residual[active] + (squared[active] / before[active]).to(rows) * along
        left = ~(squared <= goal)
        if left.any():
            error = float((squared[left] / goal[left]).max().sqrt()) * self.tolerance
            warnings.warn(
                f"conjugate gradients at {hessian.passes.where} stopped after {self.max_iterations} iterations at a"
                f" relative residual of {error:.2g}, above {self.tolerance:g}: use more max_iterations or a larger"
                " damping",
                RuntimeWarning,
                stacklevel=2,
            )
        return solution


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows in float64, shape ``(n, 1)``."""
    return (left.double() * right.double()).sum(1, keepdim=True)
