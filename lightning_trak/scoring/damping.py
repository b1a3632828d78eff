"""Damping: how much is added to the diagonal of a matrix before it is inverted.

``damping`` has one unit in the whole package: the mean eigenvalue of the matrix that it is added to, which is its trace
divided by its size. ``damping=0.1`` adds a tenth of that. So it means the same whatever the scale of the features, the
number of examples and the size of the matrix. The ridge, or lambda, is what is added, in the units of the matrix.
"""

from typing import Literal

from torch import Tensor

from lightning_trak.checks import number_or_auto

Damping = float | Literal["auto"]


def require_damping(damping: Damping) -> Damping:
    """The damping, if it is one.

    Raises:
        ValueError: if it is negative, NaN or infinite, a bool, or another word than "auto".
    """
    return number_or_auto("damping", damping, 0)


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
        noise: how noisy the scores are that the damping is for, see
            :class:`~lightning_trak.scoring.newton.noise.Noise`.

    Returns:
        The damping; not a number if K is zero.
    """
    num_effective = trace.square() / squared_weights
    return float(1.75 * noise * size / num_effective)


def absolute_damping(damping: Damping, weights: Tensor, size: int, where: str, noise: float = 1.0) -> float:
    """The ridge lambda that a damping stands for, of a matrix that is known by its trace alone.

    Args:
        damping: relative to the mean eigenvalue of the matrix, or ``"auto"``.
        weights: what each example adds to the matrix's trace: w_j, shape ``(n,)``.
        size: the number of the matrix's rows.
        where: what to call the matrix in errors.
        noise: for ``"auto"``, see :class:`~lightning_trak.scoring.newton.noise.Noise`.

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
