"""Arnoldi iteration: the inverse of the Hessian in the span of its leading eigenvectors."""

import random
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.methods.influence.solvers import InverseProduct, Solver


@dataclass(frozen=True)
class Arnoldi(Solver):
    """IF-Arnoldi (Schioppa et al. 2022, arXiv 2112.03052): the inverse in the span of the leading eigenvectors alone.

    The Hessian is projected to the Krylov space of a random vector, of ``num_iterations`` dimensions, and the
    eigenvectors of that matrix with the ``rank`` largest absolute eigenvalues are kept. What lies outside their span is
    left out: the method takes its inverse as zero. If both numbers are the number of parameters, nothing is left out.
    Holds ``num_iterations`` vectors of all parameters.

    Directions in which the damped Hessian is negative are left out too, with a warning: there the loss has no minimum.

    Args:
        num_iterations: passes over the training data.
        rank: eigenvectors that are kept; at most ``num_iterations``.
    """

    num_iterations: int = 100
    rank: int = 50

    def prepare(self, hessian: Hessian) -> InverseProduct:
        """Iterate; no further pass is needed for the targets.

        Raises:
            ValueError: if no direction with positive eigenvalue is found.
        """
        basis, projected = self._iterate(hessian)
        values, vectors = torch.linalg.eigh(projected)
        leading = values.abs().argsort(descending=True)[: self.rank]
        kept = leading[values[leading] + hessian.ridge > 0]
        if len(kept) < len(leading):
            warnings.warn(
                f"{len(leading) - len(kept)} of the {len(leading)} leading eigenvalues of the damped Hessian at"
                f" {hessian.passes.where} are negative (down to {float(values.min()):.3g} undamped) and left out",
                RuntimeWarning,
                stacklevel=2,
            )
        if len(kept) == 0:
            raise ValueError(
                f"the damped Hessian at {hessian.passes.where} has no positive eigenvalue among the leading"
                f" {len(leading)}: use a larger rank or damping, or curvature='gauss_newton'"
            )
        directions = vectors[:, kept].T.to(basis) @ basis
        inverse = (1 / (values[kept] + hessian.ridge)).to(basis)
        return lambda rows, _: (rows @ directions.T * inverse) @ directions

    def _iterate(self, hessian: Hessian) -> tuple[Tensor, Tensor]:
        """An orthonormal basis of the Krylov space, ``(m, p)``, and H in it, float64 ``(m, m)``."""
        passes = hessian.passes
        dimension = min(self.num_iterations, passes.size)
        generator = torch.Generator().manual_seed(random.Random(passes.key("arnoldi")).getrandbits(63))
        vector = torch.randn(passes.size, generator=generator, dtype=passes.dtype).to(passes.device)
        basis = torch.zeros(dimension, passes.size, dtype=passes.dtype, device=passes.device)
        projected = torch.zeros(dimension, dimension, dtype=torch.float64, device=passes.device)
        for step in range(dimension):
            basis[step] = vector / vector.norm()
            vector = hessian.product(basis[step : step + 1])[0]
            length = vector.norm()
            known = basis[: step + 1]
            for _ in range(2):  # once is not enough: rounding brings back what was removed
                overlaps = known @ vector
                projected[: step + 1, step] += overlaps.double()
                vector = vector - overlaps @ known
            # What is left is rounding: the space is closed under multiplication with H.
            if vector.norm() <= 10 * torch.finfo(passes.dtype).eps * length * dimension**0.5:
                basis, projected = known, projected[: step + 1, : step + 1]
                break
            if step + 1 < dimension:
                projected[step + 1, step] = vector.norm()
        return basis, (projected + projected.T) / 2
