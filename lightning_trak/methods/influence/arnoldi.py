"""Arnoldi iteration: the inverse of the Hessian in the span of its leading eigenvectors."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.checks import positive
from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.methods.influence.score_error import ROUGH, score_error
from lightning_trak.methods.influence.solvers import InverseProduct, Solver


@dataclass(frozen=True)
class Arnoldi(Solver):
    """IF-Arnoldi (Schioppa et al. 2022, arXiv 2112.03052): the inverse in the span of the leading eigenvectors alone.

    The Hessian is projected to the Krylov space of a random vector, of ``num_iterations`` dimensions, and the
    eigenvectors of that matrix with the ``rank`` largest absolute eigenvalues are kept. What lies outside their span is
    left out: the method takes its inverse as zero. If the space is closed under multiplication with the Hessian before
    that, to the precision of the gradients, and all of it is kept, nothing is left out: beyond it the Hessian is zero.
    Holds ``num_iterations`` vectors of all parameters.

    Directions in which the damped Hessian is negative are left out too, with a warning: there the loss has no minimum.
    If there are none, the scores of the first targets are compared with better ones, by five more passes, and a warning
    says if they are off by more than 2%.

    Args:
        num_iterations: passes over the training data.
        rank: eigenvectors that are kept; at most ``num_iterations``.
    """

    num_iterations: int = 100
    rank: int = 50

    def __post_init__(self) -> None:
        for name in ("num_iterations", "rank"):
            positive(name, getattr(self, name))

    def prepare(self, hessian: Hessian) -> InverseProduct:
        """Iterate; no further pass is needed for the targets.

        Raises:
            ValueError: if no direction with positive eigenvalue is found, or a product is not finite.
        """
        basis, projected, closed = self._iterate(hessian)
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
        checked = len(kept) < len(leading)
        whole = closed and hessian.ridge > 0 and len(leading) == len(basis)

        def multiply(rows: Tensor, _targets: range) -> Tensor:
            nonlocal checked
            solved: Tensor = (rows @ directions.T * inverse) @ directions
            if whole:
                outside = rows
                for _ in range(2):  # once is not enough, as in the iteration
                    outside = outside - (outside @ basis.T) @ basis
                solved += outside / hessian.ridge
            if not checked:
                checked = True
                self._warn_if_rough(hessian, rows, solved, whole)
            return solved

        return multiply

    def _warn_if_rough(self, hessian: Hessian, rows: Tensor, solved: Tensor, whole: bool) -> None:
        """Warn if the scores of the first targets are far off.

        Args:
            hessian: the Hessian.
            rows: gradients of some targets.
            solved: what this solver makes of them.
            whole: whether nothing was left out on purpose.
        """
        error = score_error(hessian, rows, solved)
        if error.share <= ROUGH:
            return
        more = 'use a Trainer with precision="64-true"' if whole else "use a larger num_iterations and a larger rank"
        warnings.warn(
            f"{error.message}, because {self} leaves directions out: {more}, or ConjugateGradient()",
            RuntimeWarning,
            stacklevel=2,
        )

    def _iterate(self, hessian: Hessian) -> tuple[Tensor, Tensor, bool]:
        """An orthonormal basis of the Krylov space, ``(m, p)``, H in it, float64 ``(m, m)``, and whether it is closed.

        It is closed if H multiplies none of its vectors out of it.
        """
        passes = hessian.passes
        dimension = min(self.num_iterations, passes.size)
        vector = passes.random_vector("arnoldi")
        basis = torch.zeros(dimension, passes.size, dtype=passes.dtype, device=passes.device)
        projected = torch.zeros(dimension, dimension, dtype=torch.float64, device=passes.device)
        closed = dimension == passes.size
        for step in range(dimension):
            basis[step] = vector / vector.norm()
            vector = hessian.product(basis[step : step + 1])[0]
            if not bool(vector.isfinite().all()):
                raise ValueError(
                    f"a product with the Hessian at {passes.where} is not finite: look for NaN and very large numbers"
                    ' in the weights and the data, or use a Trainer with precision="64-true"'
                )
            length = vector.norm()
            known = basis[: step + 1]
            for _ in range(2):  # once is not enough: rounding brings back what was removed
                overlaps = known @ vector
                projected[: step + 1, step] += overlaps.double()
                vector = vector - overlaps @ known
            # What is left is rounding: the space is closed under multiplication with H.
            if vector.norm() <= 10 * torch.finfo(passes.dtype).eps * length * dimension**0.5:
                basis, projected, closed = known, projected[: step + 1, : step + 1], True
                break
            if step + 1 < dimension:
                projected[step + 1, step] = vector.norm()
        return basis, (projected + projected.T) / 2, closed
