"""How much damping, from the features alone."""

import math
from numbers import Real
from typing import Literal

from torch import Tensor

Damping = float | Literal["auto"]


def require_damping(damping: Damping) -> Damping:
    """The damping, if it is one.

    Raises:
        ValueError: if it is negative, NaN or infinite, or another word than "auto".
    """
    if damping != "auto" and not (isinstance(damping, Real) and 0 <= damping < math.inf):
        raise ValueError(f"damping must be at least 0, or 'auto'; got {damping!r}, which is no finite number from 0 on")
    return damping


def auto_damping(gram: Tensor, squared_weights: Tensor) -> float:
    """The rule k / (2 n_eff), relative to the mean of the Gram matrix's diagonal, which was found by measurement.

    Example j adds ``w_j = R_j |phi_j|^2`` to the trace of K. n_eff = (sum_j w_j)^2 / sum_j w_j^2 is how many
    examples carry that trace (Kish 1965, Survey Sampling, for the effective size of a weighted sample): n if all
    carry alike, few if the model is sure of most. In absolute units the rule is lambda = sum_j w_j^2 / (2 sum_j
    w_j), half of what an example that carries the trace adds to it. So no example outweighs the damping by far,
    however few there are, and lambda does not grow with k, since projections keep norms. docs/faithfulness.md has
    the evidence, failures too.

    Args:
        gram: K, shape ``(k, k)``.
        squared_weights: sum_j w_j^2.

    Returns:
        The damping; not a number if K is zero.
    """
    num_effective = gram.trace().square() / squared_weights
    return float(len(gram) / (2 * num_effective))


def absolute_damping(damping: Damping, weights: Tensor, size: int, where: str) -> float:
    """The lambda of a matrix that need not be there: what :func:`auto_damping`, or a number, means for it.

    Args:
        damping: relative to the mean of the matrix's diagonal, or ``"auto"``.
        weights: what each example adds to the matrix's trace: w_j, shape ``(n,)``.
        size: the number of its rows.
        where: what to call the matrix in errors.

    Raises:
        ValueError: if the matrix is zero.
    """
    total = weights.sum()
    if total <= 0:
        raise ValueError(
            f"there is no curvature at {where}: the output has no gradient, or the loss is linear in it (use an output"
            " with a curvature, such as ClassificationMargin, or NegativeLoss), or the model is so sure of all training"
            ' examples that probabilities are 0 or 1 to rounding (use an earlier checkpoint, or precision="64-true")'
        )
    return float(weights.square().sum() / (2 * total) if damping == "auto" else damping * total / size)
