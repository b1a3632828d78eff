"""Damping: how much is added to the diagonal of a matrix before it is inverted.

``damping`` has one unit in the whole package: the mean eigenvalue of the matrix that it is added to, which is its trace
divided by its size. ``damping=0.1`` adds a tenth of that. So it means the same whatever the scale of the features, the
number of examples and the size of the matrix. The ridge, or lambda, is what is added, in the units of the matrix.
"""

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Literal, cast

import torch
from torch import Tensor

Damping = float | Literal["auto"]


def require_damping(damping: Damping) -> Damping:
    """The damping, if it is one.

    Raises:
        ValueError: if it is negative, NaN or infinite, a bool, or another word than "auto".
    """
    if damping == "auto":
        return damping
    if isinstance(damping, bool) or not isinstance(damping, Real) or not 0 <= damping <= sys.float_info.max:
        raise ValueError(f"damping must be at least 0, or 'auto'; got {damping!r}, which is no finite number from 0 on")
    return float(damping)


def auto_damping(trace: Tensor, squared_weights: Tensor, size: int, noise: float = 1.0) -> float:
    """What ``damping="auto"`` is: 1.75 noise size / n_eff, relative to the matrix's mean eigenvalue.

    The rule was found by measurement. Example j adds ``w_j = R_j |phi_j|^2`` to the trace of K. n_eff = (sum_j w_j)^2 /
    sum_j w_j^2 is how many examples carry that trace (Kish 1965, Survey Sampling, for the effective size of a weighted
    sample): n if all carry alike, few if the model is sure of most. In absolute units the rule is lambda = 1.75
    noise sum_j w_j^2 / sum_j w_j: a multiple of what an example that carries the trace adds to it. lambda does not grow
    with the number of features, since projections keep norms. docs/faithfulness.md has the evidence.

    Args:
        trace: sum_j w_j, the trace of K.
        squared_weights: sum_j w_j^2.
        size: the number of K's rows.
        noise: how noisy the scores are that the damping is for, see :class:`Noise`.

    Returns:
        The damping; not a number if K is zero.
    """
    num_effective = trace.square() / squared_weights
    return float(1.75 * noise * size / num_effective)


class Noise:
    """What a damping works against, from Q and R of the training examples at all checkpoints, in sums over examples.

    In Bayes' terms lambda is the variance of the labels' noise over the prior variance of the weights. Three things
    lower it: labels that the model fits perfectly, an average over checkpoints that differ, and models that have seen
    only a part of the examples.

    Args:
        num_checkpoints: M.

    Attributes:
        sums: one float64 Tensor ``(M, M + 5)``. The sums of several processes can be added up.
    """

    def __init__(self, num_checkpoints: int) -> None:
        self.sums = torch.zeros(num_checkpoints, num_checkpoints + 5, dtype=torch.float64)

    def add(self, loss_gradients: Tensor, curvatures: Tensor, seen: Tensor | None = None) -> None:
        """Add some examples.

        Args:
            loss_gradients: Q at each checkpoint, shape ``(M, n)``.
            curvatures: R, of the same shape.
            seen: bool, of the same shape: whether the checkpoint's model was trained on the example. Default: all.
        """
        gradients, values = loss_gradients.double().cpu(), curvatures.double().cpu()
        trained = torch.ones_like(values) if seen is None else seen.double().cpu()
        sums = [values, torch.ones_like(values), trained, trained * gradients.square(), trained * values]
        self.sums += torch.cat([values @ values.T, *(part.sum(1, keepdim=True) for part in sums)], dim=1)

    @property
    def dispersions(self) -> list[float]:
        """The dispersion of the loss at each checkpoint: sum Q^2 / sum R over the examples seen, in [0.01, 1].

        It is the noise of the labels, relative to what the model's probabilities say: for a log-likelihood, E[Q^2] = R
        if the probabilities are right (McCullagh and Nelder 1989, Generalized Linear Models, chapter 9). It is near 0
        for a model that fits every label. If R is the same for all examples, as for a squared error, the loss says
        nothing about the scale of the noise; then it is 1.
        """
        squares, curvatures = self.sums[:, -2:].unbind(1)
        ratios = torch.where(self._covariances()[1], squares / curvatures, 1.0)
        return cast(list[float], ratios.clamp(0.01, 1).tolist())

    @property
    def shares(self) -> list[float]:
        """The share of the examples that each checkpoint's model has seen. Its K is smaller by as much."""
        return cast(list[float], (self.sums[:, -3] / self.sums[:, -4]).tolist())

    @property
    def agreement(self) -> float:
        """The mean of the correlation matrix of R between checkpoints: (1 + (M - 1) r) / M for a mean correlation r.

        It is the variance of the average of M estimates, relative to that of one (the design effect: Kish 1965, Survey
        Sampling): 1 for M times the same checkpoint, 1 / M for unrelated ones. Where R is the same for all examples, it
        counts as correlated.
        """
        covariances, varies = self._covariances()
        deviations = covariances.diagonal().clamp(min=0).sqrt()
        correlations = torch.where(torch.outer(varies, varies), covariances / torch.outer(deviations, deviations), 1.0)
        return float(correlations.mean().clamp(1 / len(correlations), 1))

    @property
    def temperature(self) -> float:
        """How much surer models are of examples that they have seen than of others: in [1, 10 / 3].

        It is 1 / sqrt(r), with r the mean correlation of R between two checkpoints: what one checkpoint says correlates
        with the mean of many by sqrt(r) (Spearman 1910, for the reliability of a measurement). One checkpoint does not
        show r; then it is 1 / 0.7, found by measurement. It is 1 where R is the same for all examples.
        """
        size, varies = len(self.sums), self._covariances()[1]
        if not varies.all():
            return 1.0
        correlation = 0.49 if size == 1 else (size * self.agreement - 1) / (size - 1)
        return 1 / math.sqrt(max(correlation, 0.09))

    def levels(self, weighted: bool) -> list[float]:
        """The noise at each checkpoint, for :func:`auto_damping`: agreement^2 dispersion share.

        The square was found by measurement.

        Args:
            weighted: whether K weighs examples by R. If not, their scale is unknown, and the dispersion is left out.
        """
        dispersions = self.dispersions if weighted else [1.0] * len(self.sums)
        return [self.agreement**2 * part * share for part, share in zip(dispersions, self.shares, strict=True)]

    def describe(self, weighted: bool) -> str:
        """The parts of :meth:`levels` that are not 1 by definition, for a log line; it starts with a space if any."""
        parts = []
        if weighted:
            parts.append(f"the dispersion of the loss is {ends(self.dispersions)}")
        if len(self.sums) > 1:
            parts.append(f"the agreement of the checkpoints {self.agreement:.2g}")
        if min(self.shares) < 1:
            parts.append(f"the share of the examples seen {ends(self.shares)}")
        return f" ({', '.join(parts)})" if parts else ""

    def _covariances(self) -> tuple[Tensor, Tensor]:
        """The covariance matrix of R between checkpoints, and at which of them R varies beyond rounding."""
        size = len(self.sums)
        products, total, count = self.sums[:, :size], self.sums[:, size], self.sums[:, size + 1]
        covariances = products / count - torch.outer(total / count, total / count)
        return covariances, covariances.diagonal() > 1e-9 * products.diagonal() / count


def ends(values: Sequence[float], digits: int = 2) -> str:
    """The smallest and the largest number; or one, if both are rounded to the same."""
    return " to ".join(dict.fromkeys(f"{value:.{digits}g}" for value in (min(values), max(values))))


def absolute_damping(damping: Damping, weights: Tensor, size: int, where: str, noise: float = 1.0) -> float:
    """The ridge lambda that a damping stands for, of a matrix that is known by its trace alone.

    Args:
        damping: relative to the mean eigenvalue of the matrix, or ``"auto"``.
        weights: what each example adds to the matrix's trace: w_j, shape ``(n,)``.
        size: the number of the matrix's rows.
        where: what to call the matrix in errors.
        noise: for ``"auto"``, see :class:`Noise`.

    Raises:
        ValueError: if the matrix is zero.
    """
    trace = weights.sum()
    if trace <= 0:
        raise ValueError(
            f"there is no curvature at {where}: the output has no gradient, or the loss is linear in it (use an output"
            " with a curvature, such as ClassificationMargin, or NegativeLoss), or the model is so sure of all training"
            ' examples that probabilities are 0 or 1 to rounding (use an earlier checkpoint, or precision="64-true")'
        )
    relative = auto_damping(trace, weights.square().sum(), size, noise) if damping == "auto" else damping
    return float(relative * trace / size)
