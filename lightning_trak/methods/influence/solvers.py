"""Solving with the damped Hessian: the interface of all solvers, and the direct one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.scoring.newton.gram import DampedGram

InverseProduct = Callable[[Tensor, range], Tensor]
"""Takes rows, ``(n, p)``, and the numbers of their targets, for messages; applies (H + lambda I)^-1 to each row."""

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
        gram = DampedGram(matrix, ridge / mean, hessian.passes.dtype, where)
        return lambda rows, _: gram.solve(rows)
