"""The Gram matrix of the features, and its damped Cholesky factor."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_trak.features.rows import Features

Curvature = Literal["gauss_newton", "identity"]

_ROWS = 1024  # multiplied or solved at a time: enough to outweigh passes over k x k numbers, few enough to copy


def gram_matrix(
    shards: Iterable[Features], curvature: Curvature, dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """sum_j R_j phi_j phi_j^T over the examples of some shards, and sum_j (R_j |phi_j|^2)^2.

    Args:
        shards: the features.
        curvature: ``"gauss_newton"`` weights example j by R_j = d2l/df2 (Pregibon 1981, eq. for logistic regression:
            p (1 - p)); ``"identity"`` by 1, as TRAK was published (arXiv 2303.14186, section 3).
        dim: number of features of an example.
        device: where the products are computed.

    Returns:
        float64, shapes ``(dim, dim)`` and ``()``: shards are multiplied in the features' precision (at least float32)
        and summed in float64.

    Raises:
        ValueError: if some R_j is negative: the loss is not convex in the output.
    """
    total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    squared_weights = torch.zeros((), dtype=torch.float64, device=device)
    for rows in _merged(shards):
        features = rows.features.to(device)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if curvature == "gauss_newton":
            require_convex(rows.curvatures, 'curvature="identity"')
            weighted = features * rows.curvatures.to(features).unsqueeze(1)
        else:
            weighted = features
        total += weighted.T @ features
        squared_weights += (weighted * features).sum(1, dtype=torch.float64).square().sum()
    return total, squared_weights


def require_convex(curvatures: Tensor, instead: str) -> None:
    """Refuse negative R.

    Args:
        curvatures: R of some training examples.
        instead: the setting to use for such losses.

    Raises:
        ValueError: if some R is negative.
    """
    if curvatures.min() < 0:
        raise ValueError(
            f"the second derivative of the loss is negative ({float(curvatures.min()):g}) for some training example;"
            f" the Gauss-Newton matrix needs a loss that is convex in the output: use {instead}"
        )


def _merged(shards: Iterable[Features]) -> Iterator[Features]:
    """The same rows in fewer parts, where shards are small."""
    parts: list[Features] = []
    for shard in shards:
        parts.append(shard)
        if sum(len(part.features) for part in parts) >= _ROWS:
            yield parts[0] if len(parts) == 1 else Features.cat(parts)
            parts = []
    if parts:
        yield Features.cat(parts)


def row_blocks(num_shards: int, shard_size: int) -> list[range]:
    """Shards in blocks of at least as many rows as :func:`gram_matrix` multiplies at a time.

    Products are rounded to the features' precision. Ranks share out blocks, not shards, so that the same rows are
    multiplied together however many ranks there are; then only sums in float64 differ in order.
    """
    step = -(-_ROWS // shard_size)
    return [range(num_shards)[start : start + step] for start in range(0, num_shards, step)]


class DampedGram:
    """Solves (K + lambda I) x = b by Cholesky factorisation in float64.

    Args:
        gram: K, float64, shape ``(k, k)``.
        damping: lambda relative to the mean eigenvalue of K, which is the mean of its diagonal.
        precision: dtype of the features that K was made from: what the condition number is judged by.
        name: what to call the matrix in errors.
        size: the number of rows by which the trace is divided for the mean eigenvalue. The dual's matrix has the trace
            of a larger one, whose other eigenvalues are zero. Default: k.

    Raises:
        ValueError: if K is zero, not finite, or singular to the precision of the features.
    """

    def __init__(
        self, gram: Tensor, damping: float, precision: torch.dtype, name: str, size: int | None = None
    ) -> None:
        if damping < 0:
            raise ValueError(f"damping must be at least 0, got {damping}")
        scale = gram.diagonal().mean()
        if not torch.isfinite(gram).all():
            raise ValueError(
                f"the Gram matrix of {name} is not finite: products of the features overflow; featurize with"
                " dtype=torch.float64"
            )
        if scale <= 0:
            raise ValueError(
                f"the Gram matrix of {name} is zero: the output has no gradient in the selected parameters, or the loss"
                " no curvature. Both vanish where the model is so sure of all training examples that probabilities are"
                " 0 or 1 to rounding: use checkpoints from earlier in the training, or dtype=torch.float64 and"
                ' Trainer(precision="64-true"). A loss linear in the output needs curvature="identity"'
            )
        # Divided by its scale, so that tiny gradients or curvatures cannot underflow.
        damped = gram / scale
        damped.diagonal().add_(damping * len(gram) / (size or len(gram)))
        factor, info = torch.linalg.cholesky_ex(damped)
        advice = (
            f"use a larger damping (now {damping:g}; 'auto' suits most models), a projection with a smaller dim or more"
            " training examples"
        )
        if info != 0:
            raise ValueError(f"the Gram matrix of {name} ({len(gram)} x {len(gram)}) is singular: {advice}")
        self._factor, self._scale = factor, scale
        self.largest, self.smallest = self._extreme_eigenvalues(damped)
        # Features phi with independent rounding errors e give K errors of about phi^T e, whose norm is at most
        # |phi| |e| ~ sqrt(largest) eps in units of K's scale; they must not reach the smallest eigenvalue.
        condition = f"condition number {self.largest / self.smallest:.1e}"
        noise = torch.finfo(precision).eps * self.largest**0.5 / self.smallest
        if noise > 1:
            raise ValueError(
                f"the Gram matrix of {name} is singular to the precision of its {precision} features"
                f" ({condition}): {advice}"
            )
        if noise > 0.1:
            warnings.warn(
                f"the Gram matrix of {name} is ill-conditioned ({condition}), so rounding of the {precision} features"
                f" shows in the scores: {advice}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _extreme_eigenvalues(self, damped: Tensor, steps: int = 20) -> tuple[float, float]:
        """Estimates of the largest and smallest eigenvalue, by power iteration on the matrix and on its inverse."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(len(damped), 1, generator=generator, dtype=torch.float64).to(damped.device)
        largest, smallest = start, start
        for _ in range(steps):
            largest = damped @ (largest / largest.norm())
            smallest = self._solve(smallest / smallest.norm())
        return float(largest.norm()), float(1 / smallest.norm())

    def solve(self, rows: Tensor) -> Tensor:
        """(K + lambda I)^-1 applied to each row, shape ``(n, k)``, in the rows' dtype."""
        solved = torch.empty_like(rows)
        for part, result in zip(torch.split(rows, _ROWS), torch.split(solved, _ROWS), strict=True):
            result.copy_(self._solve(part.to(torch.float64).T).T / self._scale)
        return solved

    def _solve(self, columns: Tensor) -> Tensor:
        # Not torch.cholesky_solve: on a CPU it takes twenty times as long for a single column.
        half = torch.linalg.solve_triangular(self._factor, columns, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self._factor.mT, half, upper=True)
        return whole
