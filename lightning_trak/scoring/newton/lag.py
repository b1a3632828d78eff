"""How far the training is from its end, by the features and residuals of the model alone.

At a minimum of the loss, the residuals Q are like noise in each direction of the features: a Newton step would lead to
where the model is. After a short or gentle training they still share directions. What an example has done to such a
model was done while its Q was larger, and along the path, not at a minimum. Then scores want a larger damping and
temperature. Both follow one number, the lag, which is 1 for a model that has arrived. docs/faithfulness.md has the
evidence.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from lightning_trak.features.rows import Features

Lag = float | Literal["auto"]

_DIRECTIONS = 0.6  # sum h (1 - h) / sum h for h = e / (e + lambda), K's eigenvalues e: found by measurement
_STEP = 4.0  # from one damping to the next, until the lag is surrounded
_MOST = _STEP**2  # of the lag


def residual_sums(shards: Iterable[Features], dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """sum_j Q_j phi_j and sum_j Q_j^2 |phi_j|^2 over the examples of some shards.

    Args:
        shards: the features.
        dim: number of features of an example.
        device: where the sums are computed.

    Returns:
        float64, shapes ``(dim,)`` and ``()``.
    """
    pull = torch.zeros(dim, dtype=torch.float64, device=device)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for rows in shards:
        features, residuals = rows.features.to(device, torch.float64), rows.loss_gradients.to(device, torch.float64)
        pull += residuals @ features
        squares += (residuals.square() * features.square().sum(1)).sum()
    return pull, squares


def alignment(step: float, directions: float, dispersion: float, scaled: bool) -> float:
    """The square of the residuals' Newton step over what noise in their place would have: about 1 at a minimum.

    For residuals that are independent, with mean 0 and variance R_j (McCullagh and Nelder 1989, Generalized Linear
    Models, chapter 9), lambda |(K + lambda I)^-1 sum_j Q_j phi_j|^2 is sum_e h_e (1 - h_e) on average, with h = e /
    (e + lambda) for each eigenvalue e of K. If their variance is Q_j^2, it is about ``dispersion`` times that. Neither
    is always right: the former where the model is sure and wrong, the latter where all residuals are alike. The
    geometric mean is taken. For a loss that does not know the scale of its noise, the latter is.

    Args:
        step: lambda |(K + lambda I)^-1 sum_j Q_j phi_j|^2.
        directions: tr K (K + lambda I)^-1 = sum_e h_e.
        dispersion: sum_j Q_j^2 |phi_j|^2 / sum_j R_j |phi_j|^2.
        scaled: whether R_j is the variance of Q_j if the model is right, as for a log-likelihood.
    """
    if dispersion == 0:  # no residuals
        return 0.0
    return step / (_DIRECTIONS * directions * (math.sqrt(dispersion) if scaled else dispersion))


def find_lag(aligned: Callable[[float], float]) -> float:
    """The lag: the factor of the damping that is as large as :func:`alignment` there, or 1 if that is smaller at 1.

    The factors 1, 4 and 16 are tried until one is larger than the alignment. Between the last two, the logarithm of the
    alignment is taken as linear in that of the factor.

    Args:
        aligned: :func:`alignment` when the damping is multiplied by a factor.

    Returns:
        In [1, 16].
    """

    def surplus(factor: float) -> float:
        return math.log(max(aligned(factor), 1e-300) / factor)

    factor, here = 1.0, surplus(1.0)
    if here <= 0:
        return 1.0
    while factor < _MOST:
        before, factor = here, factor * _STEP
        here = surplus(factor)
        if here <= 0:
            return float(factor * _STEP ** (here / (before - here)))
    return factor
