"""The Gram matrix of the features, and its damped Cholesky factor."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_trak.features.rows import Features
from lightning_trak.running.chunks import chunked

Curvature = Literal["gauss_newton", "identity"]

_COLUMNS = 256  # of a panel of the Gram matrix: enough for fast products, few enough to leave out almost half of them
_ROWS = 1024  # multiplied or solved at a time: enough to outweigh passes over k x k numbers, few enough to copy
PROBES = 32  # random vectors that a trace is estimated with


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
    panels = [slice(start, min(start + _COLUMNS, dim)) for start in range(0, dim, _COLUMNS)]
    squared_weights = torch.zeros((), dtype=torch.float64, device=device)
    for rows in _merged(shards):
        if len(rows.features) == 0:  # none was trained on at this checkpoint, or all were left out
            continue
        features = rows.features.to(device)
        features, unit = _in_range(features.to(torch.promote_types(features.dtype, torch.float32)))
        weighted, scale = features, unit.square()
        if curvature == "gauss_newton":
            require_convex(rows.curvatures, 'curvature="identity"')
            curvatures, unit = _in_range(rows.curvatures.to(features))
            weighted, scale = features * curvatures.unsqueeze(1), scale * unit
        for panel in panels:  # the lower triangle
            product = weighted[:, panel].T @ features[:, : panel.stop]
            total[panel, : panel.stop].addcmul_(product.double(), scale)
        squared_weights += ((weighted * features).sum(1, dtype=torch.float64) * scale).square().sum()
    for panel in panels:
        square = total[panel, panel]
        square.copy_(square.tril() + square.tril(-1).T)
        total[panel, panel.stop :] = total[panel.stop :, panel].T
    return total, squared_weights


def _in_range(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers divided by a power of two, so that products neither underflow nor overflow, and that power in float64."""
    largest = torch.stack(numbers.aminmax()).abs().amax().double()
    unit = torch.where(largest > 0, largest / largest.frexp().mantissa, 1.0).clamp(2.0**-126, 2.0**126)
    return numbers / unit.to(numbers), unit


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


def shard_blocks(num_shards: int, shard_size: int) -> list[range]:
    """Shards in blocks of at least as many rows as :func:`gram_matrix` multiplies at a time.

    Products are rounded to the features' precision. Ranks share out blocks, not shards, so that the same rows are
    multiplied together however many ranks there are; then only sums in float64 differ in order.
    """
    return chunked(range(num_shards), -(-_ROWS // shard_size))


class DampedGram:
    """Solves (K + lambda I) x = b by Cholesky factorisation in float64.

    Args:
        gram: K, float64, shape ``(k, k)``.
        damping: lambda relative to the mean eigenvalue of K, which is the mean of its diagonal.
        precision: dtype of the features that K was made from: what the condition number is judged by.
        name: what to call the matrix in errors.
        size: the number of rows by which the trace is divided for the mean eigenvalue. The dual's matrix has the trace
            of a larger one, whose other eigenvalues are zero. Default: k.

    Attributes:
        ridge: lambda itself.
        largest: an estimate of the largest eigenvalue of K + lambda I, relative to the mean eigenvalue of K.
        smallest: the same of the smallest eigenvalue.

    Raises:
        ValueError: if K is zero, not finite, or singular to the precision of the features.
    """

    def __init__(
        self,
        gram: Tensor,
        damping: float,
        precision: torch.dtype,
        name: str,
        size: int | None = None,
    ) -> None:
        if damping < 0:
            raise ValueError(f"damping must be at least 0, got {damping}")
        scale = gram.diagonal().mean()
        _require_nonzero(gram, scale, name)
        # Divided by its scale, so that tiny gradients or curvatures cannot underflow. The factor takes the place of
        # this copy, because both have k x k numbers. The transpose is the same matrix, with LAPACK's strides.
        factor = (gram / scale).mT
        share_of_size = len(gram) / (size or len(gram))
        self._mean_eigenvalue, self._size = share_of_size * float(scale), size or len(gram)
        self.ridge = damping * self._mean_eigenvalue
        factor.diagonal().add_(damping * share_of_size)
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        advice = (
            f"use a larger damping (now {damping:g}; 'auto' suits most models), a projection with a smaller dim or more"
            " training examples"
        )
        if info != 0:
            raise ValueError(f"the Gram matrix of {name} ({len(gram)} x {len(gram)}) is singular: {advice}")
        self._factor, self._scale, self._diagonal = factor, scale, gram.diagonal().clone()
        self.largest, self.smallest = self._extreme_eigenvalues()
        self._require_precise(precision, name, advice)

    @property
    def _condition(self) -> str:
        return f"condition number {self.largest / self.smallest:.1e}"

    def _require_precise(self, precision: torch.dtype, name: str, advice: str) -> None:
        """Refuse a matrix whose smallest eigenvalue drowns in the rounding of the features, and warn if it is close.

        Features phi with independent rounding errors e give K errors of about phi^T e, whose norm is at most
        |phi| |e| ~ sqrt(largest) eps in units of K's scale. They must not reach the smallest eigenvalue.
        """
        noise = torch.finfo(precision).eps * self.largest**0.5 / self.smallest
        if noise > 1:
            raise ValueError(
                f"the Gram matrix of {name} is singular to the precision of its {precision} features"
                f" ({self._condition}): {advice}"
            )
        if noise > 0.1:
            warnings.warn(
                f"the Gram matrix of {name} is ill-conditioned ({self._condition}), so rounding of the {precision}"
                f" features shows in the scores: {advice}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _extreme_eigenvalues(self, steps: int = 20) -> tuple[float, float]:
        """Estimates of the largest and smallest eigenvalue, by power iteration on the matrix and on its inverse."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(len(self._factor), 1, generator=generator, dtype=torch.float64).to(self._factor.device)
        largest, smallest = start, start
        for _ in range(steps):
            largest = self._factor @ (self._factor.mT @ (largest / largest.norm()))
            smallest = self._solve(smallest / smallest.norm())
        return float(largest.norm()), float(1 / smallest.norm())

    def score_noise(self, error: float) -> float:
        """What rounding the features changes in the scores sqrt(R_x R_i) phi_x^T A^-1 phi_i, relative to their norm.

        A is K + lambda I. Rounding adds noise e_i of the norm error |phi_i|, with the same variance in all k features.
        So the sum of squares of phi_x^T A^-1 e_i is N tr (A^-1 K A^-1) on average, N = error^2 tr K / k, and that of
        the scores is tr (K A^-1)^2. Random vectors estimate traces. The noise also changes K, in one of two ways:

        - It is added, as D = error^2 diag(K), where each row has noise of its own. This lowers scores by K A^-1 D A^-1.
          Where all rows share much, they share noise, too. Then the mean of D, which overstates it less, takes its
          place.
        - Examples that are nearly alike have nearly the same noise, which hides how they differ. K does not show what
          is hidden: up to N in each direction, and nothing of rows of zeros. So it is added to K in the first sum.

        No K gives more than about error (1 + tr K / lambda), which is taken where a large lambda leaves rounding errors
        alone.
        """
        noise, shares = error**2 * self._mean_eigenvalue, self._diagonal / self._scale
        signs = random_signs(PROBES, len(self._factor)).to(self._factor)
        solved = self.solve(signs)
        kept = signs - self.ridge * solved  # K A^-1 times them
        random = noise * (solved * kept).sum().clamp(min=0)
        hidden = noise**2 * (shares * solved.square()).sum()
        added = error**2 * self._scale * solved
        added = torch.stack([added * shares, added])
        lowered = added - self.ridge * self.solve(added.flatten(0, 1)).view_as(added)
        squares = random + torch.maximum(hidden, lowered.square().sum((1, 2)).amin())
        most = error * (1 + self._diagonal.sum() / self.ridge)
        return float(torch.fmin((squares / kept.square().sum()).sqrt(), most))

    def mean_inverse(self) -> float:
        """The mean eigenvalue of (K + lambda I)^-1, of ``size`` eigenvalues. Random vectors estimate the trace."""
        signs = random_signs(PROBES, len(self._factor)).to(self._factor)
        trace, others = float((signs * self.solve(signs)).sum()) / PROBES, self._size - len(self._factor)
        return max(0.0, trace + (others / self.ridge if others else 0.0)) / self._size

    def squared_step(self, pull: Tensor) -> float:
        """How long a Newton step is: lambda |(K + lambda I)^-1 pull|^2, for a float64 vector ``(k,)``."""
        return self.ridge * float(self.solve(pull.unsqueeze(0)).square().sum())

    def solve(self, rows: Tensor) -> Tensor:
        """(K + lambda I)^-1 applied to each row, shape ``(n, k)``, in the rows' dtype."""
        solved = torch.empty_like(rows)
        for part, result in zip(torch.split(rows, _ROWS), torch.split(solved, _ROWS), strict=True):
            result.copy_(self._solve(part.to(torch.float64).T).T / self._scale)
        return solved

    def own(self, rows: Tensor) -> Tensor:
        """The number x (K + lambda I)^-1 x^T of each row x, shape ``(n,)``: |L^-1 x|^2 for the factor L."""
        parts = (self._half_solve(part.to(torch.float64).T).square().sum(0) for part in torch.split(rows, _ROWS))
        return (torch.cat(list(parts)) / self._scale).to(rows.dtype)

    def effective_dimension(self) -> float:
        """How many directions lambda leaves: tr K (K + lambda I)^-1.

        See Hastie et al. 2009, The Elements of Statistical Learning, section 3.4.1. It is k - lambda tr (K + lambda
        I)^-1, and that trace is |L^-1|^2 for the factor L. No K has less than tr K / (tr K + lambda), which is taken
        where a large lambda leaves rounding errors alone.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._factor.device)
        for start in range(0, len(self._factor), _ROWS):
            rest = self._factor[start:, start:]
            columns = torch.zeros(len(rest), min(_ROWS, len(rest)), dtype=torch.float64, device=rest.device)
            columns.fill_diagonal_(1)
            total += torch.linalg.solve_triangular(rest, columns, upper=False).square().sum()
        size, ridge = len(self._factor), self.ridge / float(self._scale)
        return max(size - ridge * float(total), size / (size + ridge))

    def _solve(self, columns: Tensor) -> Tensor:
        # Not torch.cholesky_solve: on a CPU it takes twenty times as long for a single column.
        whole: Tensor = torch.linalg.solve_triangular(self._factor.mT, self._half_solve(columns), upper=True)
        return whole

    def _half_solve(self, columns: Tensor) -> Tensor:
        half: Tensor = torch.linalg.solve_triangular(self._factor, columns, upper=False)
        return half


def random_signs(count: int, size: int) -> Tensor:
    """The same vectors of +1 and -1 at each call: int64, shape ``(count, size)``."""
    return torch.randint(0, 2, (count, size), generator=torch.Generator().manual_seed(0)) * 2 - 1


def _require_nonzero(gram: Tensor, scale: Tensor, name: str) -> None:
    if not torch.stack(gram.aminmax()).isfinite().all():
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
