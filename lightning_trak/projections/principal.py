"""Principal axes of matrices from one pass over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERSAMPLING = 4  # columns of the sketch for each axis wanted


class PrincipalAxes:
    """Leading eigenvectors of C = sum_i X_i X_i^T, of which only a sketch C Omega is kept.

    Nystroem's approximation C ~ Y (Omega^T Y)^-1 Y^T with Y = C Omega, whose eigenvectors come from a thin SVD (Tropp
    et al. 2017, arXiv 1706.05736, algorithm 3). It is exact where the sketch is as wide as X has rows.

    Args:
        width: Number of axes.
        make_signs: Makes Omega, of shape (length, its argument).
        length: Rows of X.

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
        """The axes as columns, float32 of shape (length, width); the identity where nothing is left out."""
        if self._identity:
            return torch.eye(self._width)
        sketch, omega = self._sketch.cpu(), self._omega.cpu()
        core = omega.T @ sketch
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        # C may be of lower rank, as where outputs sum to one: eigenvalues that are rounding errors, of either sign,
        # are raised to what keeps their axes behind all others.
        floor = max(1e-6 * float(values[-1]), torch.finfo(torch.float64).tiny)
        half = sketch @ (vectors * values.clamp_min(floor).rsqrt())
        axes = torch.linalg.svd(half, full_matrices=False).U[:, : self._width]
        # An eigenvector's sign is arbitrary: let its largest entry be positive.
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        signed: Tensor = axes * largest.sign()
        return signed.float().contiguous()
