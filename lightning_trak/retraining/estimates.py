"""Means and proportions over targets, with intervals."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.metrics.functional import bootstrap_interval


class Estimate(NamedTuple):
    """Means over targets, with an interval for the mean over new targets. All tensors have one shape, in float64.

    Attributes:
        mean: over the targets.
        low: lower end of the interval; NaN if there is one target.
        high: upper end.
    """

    mean: Tensor
    low: Tensor
    high: Tensor

    def written(self, form: str, *place: int) -> str:
        """The mean at a place with its interval, such as ``"1.08 (0.82 to 1.35)"``.

        If both ends of the interval round to the mean, or are not known, the interval is left out. If there are no
        targets, the text is empty.

        Args:
            form: a format specification, such as ``".2f"``.
            place: an index for each dimension.
        """
        if math.isnan(self.mean[place]):
            return ""
        mean, low, high = (format(float(values[place]), form) for values in self)
        return mean if low == mean == high or math.isnan(self.low[place]) else f"{mean} ({low} to {high})"


def mean_of(values: Tensor, confidence: float = 0.95, num_bootstraps: int = 2000, seed: int = 0) -> Estimate:
    """The mean over targets with a percentile bootstrap interval.

    Args:
        values: ``(..., num_targets)``.
        confidence: of the interval, in (0, 1).
        num_bootstraps: replicates.
        seed: of the replicates; the global random state is neither read nor changed.

    Returns:
        Shapes ``(...)``, in the unit of the values.
    """
    low, high = bootstrap_interval(values, confidence, num_bootstraps, seed)
    return Estimate(values.double().mean(-1), low, high)


def proportion_of(successes: Tensor, total: Tensor | int, confidence: float) -> Estimate:
    """A proportion with Wilson's interval (Wilson 1927, Journal of the American Statistical Association 22).

    The counts may be fractions: :meth:`~lightning_trak.retraining.Brittleness.noise_flips` averages them over
    references. SciPy has this interval for whole numbers alone, one proportion at a time.

    Args:
        successes: how often the event happened, ``(...)``.
        total: out of how many times, a number or ``(...)``. Where it is 0, all results are NaN.
        confidence: of the interval, in (0, 1).

    Returns:
        Shapes ``(...)``, from 0 to 1.

    Raises:
        ValueError: if ``confidence`` is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be strictly between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    total = torch.as_tensor(total, dtype=torch.float64)
    share = successes.double() / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    radius = z / (1 + z**2 / total) * (share * (1 - share) / total + z**2 / (4 * total**2)).sqrt()
    return Estimate(share, (centre - radius).clamp(min=0), (centre + radius).clamp(max=1))
