"""Intervals of mean scores, by bootstrap over targets."""

import torch
from torch import Tensor

from lightning_trak.checks import positive


def bootstrap_interval(scores: Tensor, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> Tensor:
    """The percentile interval of the mean over targets (Efron 1979): targets are drawn again, with replacement.

    Args:
        scores: of at least two targets, shape ``(num_targets, n)``, such as sums over groups of training examples, or
            scores of a few chosen ones. A matrix of ``(resamples, n)`` is formed.
        confidence: the level, between 0 and 1.
        resamples: how often the targets are drawn.
        seed: of the draws.

    Returns:
        float64, shape ``(2, n)``: the low ends, and the high ends.

    Raises:
        ValueError: if an argument is out of range, or a score is not finite.

    Example:
        >>> bootstrap_interval(torch.tensor([[2.0], [2.0], [2.0]])).tolist()
        [[2.0], [2.0]]
    """
    if scores.ndim != 2 or len(scores) < 2:
        raise ValueError(f"expected scores of at least two targets, (num_targets, n), got {tuple(scores.shape)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if not scores.isfinite().all():
        raise ValueError("some scores are NaN or infinite; score again")
    count = len(scores)
    drawn = torch.randint(
        count, (positive("resamples", resamples), count), generator=torch.Generator().manual_seed(seed)
    )
    times = torch.zeros(len(drawn), count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    means = times @ scores.cpu().double() / count
    tail = (1 - confidence) / 2
    return means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
