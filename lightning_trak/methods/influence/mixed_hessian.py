"""A mean of two Hessians."""

import torch
from torch import Tensor

from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.scoring.damping import Damping, absolute_damping


class MixedHessian(Hessian):
    """(1 - share) H + share H' + lambda I, for two Hessians of the same parameters at the same checkpoint.

    Args:
        first: H.
        second: H'.
        share: that of H', in [0, 1].
        damping: as for :class:`Hessian`, relative to the mean eigenvalue of the mean.
        level: what the automatic damping is multiplied by.
    """

    def __init__(self, first: Hessian, second: Hessian, share: float, damping: Damping, level: float) -> None:
        # Not that of the base, which passes over the training data: both have done so.
        self._first, self._second, self._share = first, second, share
        self.passes, self.curvature, self.convergence = first.passes, first.curvature, first.convergence
        self.weights = torch.cat([(1 - share) * first.weights, share * second.weights])
        self.ridge = absolute_damping(damping, self.weights, self.passes.size, self.passes.where, level)

    def heaviest(self, count: int) -> Tensor:
        """Half of the rows from each, times the root of its share."""
        rows = self._first.heaviest(count - count // 2), self._second.heaviest(count // 2)
        return torch.cat([rows[0] * (1 - self._share) ** 0.5, rows[1] * self._share**0.5])

    def product(self, vectors: Tensor) -> Tensor:
        """The mean times each row of ``vectors``, shape ``(n, p)``: two passes over the training data."""
        return (1 - self._share) * self._first.product(vectors) + self._share * self._second.product(vectors)
