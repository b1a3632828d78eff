"""Bootstrap intervals: for the mean of a sample, and of a table whose rows and columns are both samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_trak.checks import integer, real, require_tensor

_MAX_COUNTS = 2**24  # resampling counts held at once: 128 MiB of float64
_LEAST_ERROR = 0.25  # of a replicate's standard error, relative to the table's


def bootstrap_interval(
    values: Tensor,
    confidence: float = 0.95,
    num_bootstraps: int = 2000,
    seed: int = 0,
    weights: Tensor | None = None,
) -> Tensor:
    """Percentile bootstrap interval for the mean of a sample (Efron and Tibshirani, 1993, chapter 13).

    The sample is the last dimension; everything else is resampled by the same draws.

    Args:
        values: ``(..., size)``, at least one value in the sample.
        confidence: probability that the interval holds the expected mean, in (0, 1).
        num_bootstraps: replicates.
        seed: of the replicates; the global random state is neither read nor changed.
        weights: ``(size,)``, positive: each value is drawn with its weight, and the mean is weighted. Default: equal.

    Returns:
        ``(2, ...)`` float64: lower and upper end; NaN for a sample of one value, which does not show how values vary.

    Raises:
        ValueError: If there is no sample, the replicates are too few to reach the tails, or the weights do not fit.

    Example:
        >>> import torch
        >>> values = torch.tensor([[0.1, 0.3, 0.2, 0.2], [1.0, 1.0, 1.0, 1.0]])
        >>> bootstrap_interval(values)
        tensor([[0.1250, 1.0000],
                [0.2750, 1.0000]], dtype=torch.float64)
    """
    require_tensor("values", values)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"Expected a sample in the last dimension, but got shape {tuple(values.shape)}.")
    tail = _tail(confidence, num_bootstraps)
    values, size = values.double(), values.shape[-1]
    if size == 1:
        return values.new_full((2, *values.shape[:-1]), torch.nan)
    weights = torch.ones(size) if weights is None else weights
    if weights.shape != (size,) or not bool((weights > 0).all()):
        raise ValueError(f"Expected {size} positive weights, but got {weights.tolist()!r:.200}.")
    weights = weights.to(values)
    drawn = _drawn((size,), num_bootstraps, seed, values.device)
    means = torch.cat([(values * weights) @ counts.T / (counts @ weights) for (counts,) in drawn], dim=-1)
    return means.quantile(values.new_tensor([tail, 1 - tail]), dim=-1)


def _tail(confidence: float, num_bootstraps: int) -> float:
    """The probability of either tail, if it can be estimated."""
    if not 0 < real("confidence", confidence) < 1:
        raise ValueError(f"Expected `confidence` strictly between 0 and 1, but got {confidence}.")
    tail = (1 - confidence) / 2
    if num_bootstraps * tail < 1:
        raise ValueError(
            f"Expected `num_bootstraps` of at least {round(1 / tail + 0.5)}, so that a replicate falls in each tail at "
            f"confidence {confidence}, but got {num_bootstraps}."
        )
    return tail


def _mean_and_error(values: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each resampled table and its standard error.

    A mean over r rows and c columns with independent row, column and interaction effects has the variance
    A/r + B/c + E/(rc). The spread of the row means estimates A/r + E/(rc), that of the column means B/c + E/(rc), that
    of the residuals E/(rc); so their sum would count E three times, and first + second - third counts it once.

    Args:
        values: ``(r, c)`` table.
        rows: ``(b, r)`` how often each row was drawn.
        columns: ``(b, c)`` how often each column was drawn.
    """
    r, c = values.shape
    row_means = columns @ values.T / c
    column_means = rows @ values / r
    mean = (rows * row_means).sum(dim=1) / r
    row_squares = (rows * (row_means - mean[:, None]) ** 2).sum(dim=1)
    column_squares = (columns * (column_means - mean[:, None]) ** 2).sum(dim=1)
    squares = ((rows @ values**2) * columns).sum(dim=1)
    residual_squares = (squares - r * c * mean**2 - c * row_squares - r * column_squares).clamp(min=0)
    of_rows = row_squares / (r * (r - 1))
    of_columns = column_squares / (c * (c - 1))
    of_both = residual_squares / (r * (r - 1) * c * (c - 1))
    # The true variance is at least that of either factor, while an estimate by subtraction may even be negative.
    variance = torch.maximum(of_rows + of_columns - of_both, torch.maximum(of_rows, of_columns))
    return mean, variance.clamp(min=torch.finfo(values.dtype).tiny).sqrt()


def _counts(replicates: int, size: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(size, (replicates, size), generator=generator)
    return torch.zeros(replicates, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _drawn(sizes: Sequence[int], num_bootstraps: int, seed: int, device: torch.device) -> Iterator[list[Tensor]]:
    """How often replicates draw each value of samples of these sizes: of each sample ``(replicates, size)``.

    As many replicates at a time as fit in memory.
    """
    generator = torch.Generator().manual_seed(integer("seed", seed))
    at_once = max(1, _MAX_COUNTS // sum(sizes))
    for done in range(0, num_bootstraps, at_once):
        replicates = min(at_once, num_bootstraps - done)
        yield [_counts(replicates, size, generator).to(device) for size in sizes]


def crossed_bootstrap_interval(
    values: Tensor, confidence: float = 0.95, num_bootstraps: int = 1000, seed: int = 0
) -> Tensor:
    """Bootstrap-t interval for the mean of a table, over new rows *and* new columns.

    Each replicate draws rows and columns with replacement, independently (the pigeonhole bootstrap: Owen, 2007,
    "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)). The spread of such replicates overstates the
    variance, up to three times where the interaction dominates, so their percentiles are too wide; every replicate is
    therefore divided by its own standard error, and the quantiles of that ratio are scaled by the table's (bootstrap-t:
    Efron and Tibshirani, 1993, chapter 12). A standard error counts as a quarter of the table's at least: a replicate
    of a small table may hold equal values only, and then says nothing of their spread.

    Args:
        values: ``(num_rows, num_columns)`` table, at least 2 by 2.
        confidence: probability that the interval holds the expected mean, in (0, 1).
        num_bootstraps: replicates.
        seed: of the replicates; the global random state is neither read nor changed.

    Returns:
        ``(2,)`` float64: lower and upper end.

    Raises:
        ValueError: If the table is too small, or the replicates too few to reach the tails.

    Example:
        >>> import torch
        >>> table = torch.tensor([[0.1, 0.3, 0.2], [0.4, 0.5, 0.3], [0.2, 0.3, 0.3]])
        >>> low, high = crossed_bootstrap_interval(table)
        >>> bool(low < table.mean() < high)
        True
    """
    require_tensor("values", values)
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(
            f"Expected a table of at least 2 rows and 2 columns to resample, but got shape {tuple(values.shape)}."
        )
    tail = _tail(confidence, num_bootstraps)
    values = values.double()
    center = values.mean()
    values = values - center
    r, c = values.shape
    error = _mean_and_error(values, values.new_ones(1, r), values.new_ones(1, c))[1]
    ratios = []
    for rows, columns in _drawn((r, c), num_bootstraps, seed, values.device):
        mean, replicate_error = _mean_and_error(values, rows, columns)
        ratios.append(mean / replicate_error.clamp(min=_LEAST_ERROR * error))
    quantiles = torch.cat(ratios).quantile(values.new_tensor([1 - tail, tail]))
    return center - quantiles * error
