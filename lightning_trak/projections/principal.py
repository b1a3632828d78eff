"""Principal axes of many matrices, found in one pass over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERSAMPLING = 4  # columns of the sketch for each axis


class PrincipalAxes:
    """Leading eigenvectors of C = sum_i X_i X_i^T. Only a sketch Y = C Omega is kept.

    This is Nystroem's approximation C ~ Y (Omega^T Y)^-1 Y^T. A thin SVD gives its eigenvectors (Tropp et al. 2017,
    arXiv 1706.05736, algorithm 3). They are exact if the sketch has as many columns as X has rows.

    Args:
        width: number of axes.
        make_signs: a function that makes Omega. Its argument is the number of columns; the shape is (length, columns).
        length: number of rows of X.
    """

    def __init__(self, width: int, make_signs: Callable[[int], Tensor], length: int) -> None:
        self._width = width
        self._identity = length <= width
        columns = min(length, OVERSAMPLING * width)
        self._omega = (make_signs(columns) if columns < length else torch.eye(length)).double()
        self._sketch = torch.zeros(length, columns, dtype=torch.float64)

    def update(self, matrices: Tensor) -> None:
        """Add matrices X, of shape (batch, length, columns)."""
        if self._identity:
            return
        matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        self._omega = self._omega.to(matrices.device)
        inner = matrices.mT @ self._omega.to(matrices)
        self._sketch = self._sketch.to(matrices.device) + torch.einsum("bnc,bcw->nw", matrices, inner)

    def compute(self) -> Tensor:
        """The axes as columns, float32 of shape (length, width). The identity if there are as many axes as rows."""
        if self._identity:
            return torch.eye(self._width)
        sketch, omega = self._sketch.cpu(), self._omega.cpu()
        core = omega.T @ sketch
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        # C may have a lower rank, for example if outputs sum to one. Some eigenvalues are then rounding errors, and may
        # be negative. They are raised to a small value, and their axes stay behind all others.
        floor = max(1e-6 * float(values[-1]), torch.finfo(torch.float64).tiny)
        half = sketch @ (vectors * values.clamp_min(floor).rsqrt())
        axes = torch.linalg.svd(half, full_matrices=False).U[:, : self._width]
        return with_fixed_signs(axes).float().contiguous()


def with_fixed_signs(axes: Tensor) -> Tensor:
    """Eigenvectors, as columns, whose signs are arbitrary: the largest entry of each is made positive."""
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -axes, axes)
