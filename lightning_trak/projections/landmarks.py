"""Landmarks: the few training examples that count most for influence, and the directions that they span."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trak.projections.principal import with_fixed_signs

# Squared length of a direction, relative to the longest one, below which it is rounding of float32 sketches.
_ROUNDING = 1e-10
_COLUMNS = 1 << 12  # converted to float64 at a time


class Landmarks:
    """Those of the examples seen so far that count most, and the directions that keep most of their influence.

    With gradients s_i and R_i = d2l/df2, TRAK solves with H = sum_i R_i s_i s_i^T + lambda: the influence of example j
    on x is s_x^T H^-1 s_j Q_j. So directions must keep two things, measured by H^-1: s_x of any x, and Q_j s_j, where
    Q_j^2 is near R_j if the model is sure. The weight sqrt(R_j) lies between 1 and R_j, and keeps both (found by
    measurement: docs/faithfulness.md). The examples with the largest ``sqrt(R_i) |s_i|^2`` are kept; of equal ones,
    those with the longer gradient.

    lambda is D sum_i w_i^2 / sum_i w_i with w_i = R_i |s_i|^2 over all examples seen. D is the dispersion of the loss,
    sum Q^2 / sum R in [0.01, 1], and 1 if R is the same for all. TRAK's automatic damping is 1.75 times as large for
    one checkpoint, and smaller for many.

    Args:
        count: number of examples to keep.
        dim: length of a gradient.
        device: where gradients are.
    """

    def __init__(self, count: int, dim: int, device: torch.device) -> None:
        self._rows = torch.zeros(count, dim, device=device)
        self._curvatures = torch.zeros(count, dtype=torch.float64, device=device)
        self._squares = torch.full((count,), -1.0, dtype=torch.float64, device=device)  # -1: nothing is kept here yet
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # of w, w^2, Q^2 and R over all examples seen
        self._smallest = torch.full((1,), torch.inf, dtype=torch.float64, device=device)  # of all R
        self._largest = torch.zeros(1, dtype=torch.float64, device=device)

    @property
    def curved(self) -> bool:
        """Whether any example has a weight above zero."""
        return bool((self._curvatures * self._squares > 0).any())

    def update(self, rows: Tensor, curvatures: Tensor, loss_gradients: Tensor) -> None:
        """Look at more examples.

        Args:
            rows: their gradients, shape (batch, dim).
            curvatures: R of each, at least 0, shape (batch,).
            loss_gradients: Q of each, shape (batch,).
        """
        count = len(self._rows)
        squares, curvatures = rows.square().sum(1, dtype=torch.float64), curvatures.to(self._curvatures)
        weights = curvatures * squares
        parts = [weights, weights.square(), loss_gradients.to(curvatures).square(), curvatures]
        self._sums += torch.stack(parts).sum(1)
        self._smallest = torch.cat([self._smallest, curvatures]).amin(0, keepdim=True)
        self._largest = torch.cat([self._largest, curvatures]).amax(0, keepdim=True)
        all_curvatures, all_squares = torch.cat([self._curvatures, curvatures]), torch.cat([self._squares, squares])
        order = all_squares.argsort(descending=True, stable=True)
        order = order[(all_curvatures.sqrt() * all_squares)[order].argsort(descending=True, stable=True)]
        kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        kept[order[:count]] = True
        free, new = (~kept[:count]).nonzero()[:, 0], kept[count:].nonzero()[:, 0]
        self._rows[free] = rows[new].to(self._rows)
        self._curvatures[free] = all_curvatures[count:][new]
        self._squares[free] = all_squares[count:][new]

    def basis(self, width: int) -> Tensor:
        """Orthonormal directions that keep most influence.

        They span the leading solutions v of Y^T Y v = mu H v, with rows y_i = R_i^(1/4) s_i over the landmarks. If no
        landmark has a weight, all have R = 1 in Y, and H is the identity: kernel PCA (Schoelkopf et al. 1998).

        Args:
            width: number of directions.

        Returns:
            float32 of shape (dim, width). If the landmarks span fewer directions, the last columns are zero.
        """
        roots = self._curvatures.sqrt() if self.curved else torch.ones_like(self._curvatures)
        weights = roots * self._squares
        order = weights.argsort(descending=True, stable=True)
        order = order[: int((weights > 0).sum())]  # others add nothing
        basis = torch.zeros(self._rows.shape[1], width, device=self._rows.device)
        if not len(order):
            return basis
        scales = (roots / weights.max()).sqrt()[order, None]
        gram = torch.zeros(len(order), len(order), dtype=torch.float64, device=basis.device)
        columns = [slice(start, start + _COLUMNS) for start in range(0, len(basis), _COLUMNS)]
        for some in columns:
            part = self._rows[order, some].double() * scales
            gram += part @ part.T
        curvature = (roots[order] * weights.max() / self._ridge()).sqrt() if self.curved else 0 * roots[order]
        coefficients = scales * _coefficients(gram.cpu(), curvature.cpu()[:, None], width).to(gram)
        for some in columns:
            basis[some, : coefficients.shape[1]] = (self._rows[order, some].double().T @ coefficients).float()
        return with_fixed_signs(basis)

    def _ridge(self) -> Tensor:
        """What is added to the diagonal of H."""
        weights, squared_weights, squares, curvatures = self._sums
        varies = self._largest - self._smallest > 1e-6 * self._largest
        dispersion = torch.where(varies, (squares / curvatures).clamp(0.01, 1), 1.0)
        ridge: Tensor = dispersion * squared_weights / weights
        return ridge


def _coefficients(gram: Tensor, roots: Tensor, width: int) -> Tensor:
    """C such that Y^T C has orthonormal columns, which span the leading directions.

    In units of lambda, H = (T Y)^T (T Y) + 1 with a diagonal T. With G = Y Y^T, Woodbury's identity gives H^-1 Y^T =
    Y^T (1 - T (T G T + 1)^-1 T G). The directions are H^-1 Y^T u for the leading eigenvectors u of Y H^-1 Y^T.

    Args:
        gram: G, float64.
        roots: the diagonal of T, as a column.
        width: number of columns of C; fewer if the rank is lower.
    """
    inner = roots * gram * roots.T
    inner.diagonal().add_(1)
    factor = torch.linalg.cholesky(inner)
    half = torch.linalg.solve_triangular(factor, roots * gram, upper=False)
    found = _leading(gram - half.T @ half, width)[1]
    found = found - roots * torch.cholesky_solve(roots * (gram @ found), factor)
    found = found / found.norm(dim=0)
    values, vectors = _leading(found.T @ gram @ found, width)
    coefficients: Tensor = found @ (vectors * values.rsqrt())
    return coefficients


def _leading(matrix: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix, from the largest on, and eigenvectors; without those of rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)  # ascending
    rank = min(width, int((values > _ROUNDING * values[-1]).sum()))
    return values.flip(0)[:rank], vectors.flip(1)[:, :rank]
