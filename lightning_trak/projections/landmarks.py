"""Landmarks: the few training examples that carry most of the curvature, and the directions that they span."""

from __future__ import annotations

import torch
from torch import Tensor

# Squared length of a direction, relative to the longest one, below which it is rounding of float32 sketches.
_ROUNDING = 1e-10
_COLUMNS = 1 << 12  # converted to float64 at a time


class Landmarks:
    """Those of the examples seen so far that weigh most.

    Example i adds w_i = R_i |s_i|^2 to the trace of the Gauss-Newton matrix sum_i R_i s_i s_i^T, where s_i is its
    gradient and R_i = d2l/df2. The examples with the largest w_i are kept. Of equal w_i, the longer gradient is kept.

    Args:
        count: number of examples to keep.
        dim: length of a gradient.
        device: where gradients are.
    """

    def __init__(self, count: int, dim: int, device: torch.device) -> None:
        self._rows = torch.zeros(count, dim, device=device)
        self._curvatures = torch.zeros(count, dtype=torch.float64, device=device)
        self._squares = torch.full((count,), -1.0, dtype=torch.float64, device=device)  # -1: nothing is kept here yet

    @property
    def curved(self) -> bool:
        """Whether any example has a weight above zero."""
        return bool((self._curvatures * self._squares > 0).any())

    def update(self, rows: Tensor, curvatures: Tensor) -> None:
        """Look at more examples.

        Args:
            rows: their gradients, shape (batch, dim).
            curvatures: R of each, at least 0, shape (batch,).
        """
        count = len(self._rows)
        all_curvatures = torch.cat([self._curvatures, curvatures.to(self._curvatures)])
        all_squares = torch.cat([self._squares, rows.square().sum(1, dtype=torch.float64)])
        order = all_squares.argsort(descending=True, stable=True)
        order = order[(all_curvatures * all_squares)[order].argsort(descending=True, stable=True)]
        kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        kept[order[:count]] = True
        free, new = (~kept[:count]).nonzero()[:, 0], kept[count:].nonzero()[:, 0]
        self._rows[free] = rows[new].to(self._rows)
        self._curvatures[free] = all_curvatures[count:][new]
        self._squares[free] = all_squares[count:][new]

    def basis(self, width: int) -> Tensor:
        """Orthonormal directions in which sum_i R_i s_i s_i^T, over the landmarks, is largest.

        With rows b_i = sqrt(R_i) s_i and the eigenvectors u of B B^T = U L U^T, they are the columns of B^T U L^-1/2
        (kernel PCA, Schoelkopf et al. 1998, with weighted examples). If no landmark has a weight, all have R = 1.

        Args:
            width: number of directions.

        Returns:
            float32 of shape (dim, width), from the largest eigenvalue to the smallest. If the landmarks span fewer
            directions, the last columns are zero.
        """
        curvatures = self._curvatures if self.curved else torch.ones_like(self._curvatures)
        weights = curvatures * self._squares
        order = weights.argsort(descending=True, stable=True)
        order = order[: int((weights > 0).sum())]  # others add nothing
        basis = torch.zeros(self._rows.shape[1], width, device=self._rows.device)
        if not len(order):
            return basis
        scales = (curvatures / weights.max()).sqrt()[order, None]
        gram = torch.zeros(len(order), len(order), dtype=torch.float64, device=basis.device)
        columns = [slice(start, start + _COLUMNS) for start in range(0, len(basis), _COLUMNS)]
        for some in columns:
            part = self._rows[order, some].double() * scales
            gram += part @ part.T
        values, vectors = torch.linalg.eigh(gram.cpu())  # ascending
        rank = min(width, int((values > _ROUNDING * values[-1]).sum()))
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        coefficients = scales * (vectors * values.rsqrt()).to(gram)
        for some in columns:
            basis[some, :rank] = (self._rows[order, some].double().T @ coefficients).float()
        # The sign of an eigenvector is arbitrary. Its largest entry is made positive.
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        return torch.where(largest < 0, -basis, basis)
