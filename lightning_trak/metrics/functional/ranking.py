"""Rank statistics of every row at once, in float64 and with average ranks for ties."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.checks import require_tensor


class _SortedRows(NamedTuple):
    """How each row sorts: ``order`` sorts it, ``first`` and ``last`` bound the run of ties at each sorted position."""

    order: Tensor
    first: Tensor
    last: Tensor


def _sort_rows(values: Tensor) -> _SortedRows:
    if values.isnan().any():  # they would get the highest ranks
        raise ValueError(f"Expected numbers to rank, but {int(values.isnan().sum())} of {values.numel()} are NaN.")
    ordered, order = values.sort(dim=-1, stable=True)
    size = values.shape[-1]
    position = torch.arange(size, device=values.device).expand_as(order)
    edge = ordered.new_ones((*ordered.shape[:-1], 1), dtype=torch.bool)
    steps = ordered[..., 1:] != ordered[..., :-1]
    starts, ends = torch.cat([edge, steps], dim=-1), torch.cat([steps, edge], dim=-1)
    first = torch.where(starts, position, 0).cummax(dim=-1).values
    last = torch.where(ends, position, size).flip(-1).cummin(dim=-1).values.flip(-1)
    return _SortedRows(order, first, last)


def _unsort(values: Tensor, rows: _SortedRows) -> Tensor:
    return torch.empty_like(values).scatter_(-1, rows.order, values)


def _ranks(rows: _SortedRows) -> Tensor:
    return _unsort((rows.first + rows.last).double() / 2 + 1, rows)


def _grades(rows: _SortedRows) -> Tensor:
    """Ranks on the scale of a distribution function, centred: in (-1/2, 1/2), summing to exactly 0."""
    size = rows.order.shape[-1]
    return (_ranks(rows) - (size + 1) / 2) / size


def _mean_above(rows: _SortedRows, grades: Tensor) -> Tensor:
    """Mean over j of ``grades[j] * [x[j] > x[i]]``, ties counted half, for every i; ``grades`` must sum to 0."""
    running = torch.nn.functional.pad(grades.gather(-1, rows.order).cumsum(dim=-1), (1, 0))
    below_and_up_to = running.gather(-1, rows.first) + running.gather(-1, rows.last + 1)
    return _unsort(-below_and_up_to / (2 * grades.shape[-1]), rows)


def _check_pair(x: Tensor, y: Tensor) -> None:
    require_tensor("x", x)
    require_tensor("y", y)
    if x.ndim != 2 or x.shape != y.shape or x.shape[1] < 2:
        raise ValueError(
            "Expected two tensors of one shape `(num_rows, num_values)` with at least 2 values in a row, "
            f"but got {tuple(x.shape)} and {tuple(y.shape)}."
        )


def rank_rows(values: Tensor) -> Tensor:
    """Ranks within each row, from 1, ties sharing the average of their ranks.

    Args:
        values: ``(..., num_values)``, free of NaN.

    Returns:
        float64 ranks of the same shape.

    Raises:
        ValueError: If a value is NaN.

    Example:
        >>> import torch
        >>> rank_rows(torch.tensor([[10.0, 30.0, 10.0, 20.0]]))
        tensor([[1.5000, 4.0000, 1.5000, 3.0000]], dtype=torch.float64)
    """
    require_tensor("values", values)
    return _ranks(_sort_rows(values))


def spearman_corrcoef(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of ``x`` with the same row of ``y``.

    It is Pearson's correlation of the average ranks, as in SciPy, computed for all rows at once and in float64, so that
    no number of ties overflows.

    Args:
        x: ``(num_rows, num_values)``, free of NaN.
        y: the same shape.

    Returns:
        ``(num_rows,)`` float64 in [-1, 1]; NaN where a row of ``x`` or ``y`` is constant, as it then has no rank
        correlation.

    Raises:
        ValueError: If the shapes differ, are not two-dimensional or have rows of fewer than 2 values, or one is NaN.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 3.0]])
        >>> y = torch.tensor([[4.0, 3.0, 2.0, 1.0], [5.0, 6.0, 7.0, 8.0]])
        >>> spearman_corrcoef(x, y)
        tensor([-1.0000,  0.9487], dtype=torch.float64)
    """
    _check_pair(x, y)
    f, g = _grades(_sort_rows(x)), _grades(_sort_rows(y))
    covariance = (f * g).sum(dim=-1)
    return (covariance / ((f * f).sum(dim=-1) * (g * g).sum(dim=-1)).sqrt()).clamp(-1, 1)


def spearman_influence(x: Tensor, y: Tensor) -> Tensor:
    """Empirical influence of every column on the rank correlation of every row.

    Entry ``(t, s)`` is the derivative of row t's Spearman correlation with respect to the weight of observation s, when
    the weights sum to 1: the delta method's linear approximation to the jackknife. Ranks are functions of the whole
    row, so observation s acts through its own product of grades, through the grades it gives to others, and through
    the spread of the grades (which ties reduce). See Hampel (1974) for influence functions; Croux and Dehon (2010) give
    this one for continuous data, to which the ties are added here.

    Args:
        x: ``(num_rows, num_values)``, free of NaN.
        y: the same shape.

    Returns:
        ``(num_rows, num_values)`` float64, each row with mean 0; NaN in rows with a constant side.

    Raises:
        ValueError: If the shapes differ, are not two-dimensional or have rows of fewer than 2 values, or one is NaN.
    """
    _check_pair(x, y)
    x_rows, y_rows = _sort_rows(x), _sort_rows(y)
    f, g = _grades(x_rows), _grades(y_rows)
    covariance, f_variance, g_variance = ((a * b).mean(dim=-1, keepdim=True) for a, b in ((f, g), (f, f), (g, g)))
    d_covariance = f * g + _mean_above(x_rows, g) + _mean_above(y_rows, f) - 3 * covariance
    d_f_variance = f * f + 2 * _mean_above(x_rows, f) - 3 * f_variance
    d_g_variance = g * g + 2 * _mean_above(y_rows, g) - 3 * g_variance
    scale = (f_variance * g_variance).sqrt()
    return (d_covariance - covariance / 2 * (d_f_variance / f_variance + d_g_variance / g_variance)) / scale
