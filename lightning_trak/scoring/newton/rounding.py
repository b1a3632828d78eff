"""What rounding to integers changes in TRAK's scores."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.running.ranks import Ranks


class RoundingEffect(NamedTuple):
    """What rounding changes in the scores of a checkpoint.

    Attributes:
        share: of their size, see :meth:`~lightning_trak.scoring.newton.gram.DampedGram.score_noise`.
        name: of the checkpoint in errors.
        damping: lambda, relative to the mean eigenvalue of K.
    """

    share: float
    name: str
    damping: float

    def __str__(self) -> str:
        return (
            f"rounding the features to integers changes scores with the Gram matrix of {self.name} by about"
            f" {self.share:.0%} of their size: use a dtype of more bits or a larger damping (now {self.damping:g})"
        )

    def require_small(self) -> None:
        """Refuse scores of which rounding changes more than a half.

        Raises:
            ValueError: if it does.
        """
        if self.share > 0.5:
            raise ValueError(str(self))


class OwnRounding:
    """How much rounding adds to the products h_i = phi_i^T A^-1 phi_i of stored rows with themselves.

    With A = K + lambda I. The noise of a row meets itself. Without row i in A, this adds b_i = error^2 |phi_i|^2
    tr(A^-1) / k on average. Row i in A turns a product x into x / (1 + R_i x), so that it adds (1 - R_i h_i) b_i.

    Args:
        noise: error^2 tr(A^-1) / k.
    """

    def __init__(self, noise: float) -> None:
        self._noise = noise
        self._sums = torch.zeros(2, dtype=torch.float64)  # of what is added, and of the products

    def count(self, products: Tensor, squares: Tensor, curvatures: Tensor) -> None:
        """Count the products of some rows.

        Args:
            products: h_i, float64, shape ``(n,)``, like the others.
            squares: |phi_i|^2.
            curvatures: R_i, with which row i is in A; 0 for one that is not.
        """
        added = self._noise * squares * (1 - curvatures * products).clamp(min=0)
        self._sums += torch.stack([added.sum(), products.sum()]).cpu()

    def check(self, name: str, damping: float, ranks: Ranks) -> None:
        """Warn if more than a fifth of the sum of the products is added by rounding.

        Args:
            name: of the checkpoint.
            damping: lambda, relative to the mean eigenvalue of K.
            ranks: the processes that share the examples; all must call this.

        Raises:
            ValueError: if it is more than a half.
        """
        added, products = ranks.sum(self._sums).tolist()
        share = added / products if products else 0.0
        message = (
            f"rounding the features to integers makes up about {share:.0%} of the scores of training examples for"
            f" themselves at {name}: use a dtype of more bits or a larger damping (now {damping:g})"
        )
        if share > 0.5:
            raise ValueError(message)
        if share > 0.2:
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def warn_of_rounding(effects: Sequence[RoundingEffect]) -> None:
    """Warn of the largest effect if it is above a fifth."""
    worst = max(effects, default=None)
    if worst is not None and worst.share > 0.2:
        warnings.warn(str(worst), RuntimeWarning, stacklevel=2)
