"""Intervals by bootstrap over targets, for means and sums of their scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.metrics.functional import bootstrap_interval
from lightning_trak.scoring.groups import Sums
from lightning_trak.scoring.topk import Scores, TopK, each_end
from lightning_trak.texts.display import tuple_line

_COLUMNS = 2048  # at once: each has as many numbers as there are replicates


class Interval(NamedTuple):
    """Means or sums over targets, and an interval for each, by bootstrap over the targets of its group.

    All three have the same form: a Tensor ``(num_groups, num_columns)``, or with ``top_k`` the best columns, whose
    ``indices`` are the same in all three.

    Attributes:
        scores: the means or sums.
        low: the lower ends.
        high: the upper ends.
    """

    scores: Scores
    low: Scores
    high: Scores

    def __repr__(self) -> str:
        return tuple_line(self)


def require_resampling(rows: Sums) -> None:
    """Check that each group has targets to draw from.

    Raises:
        ValueError: if a group has fewer than two targets whose weight is not zero.
    """
    counts = torch.bincount(rows.numbers[(rows.numbers >= 0) & (rows.weights != 0)], minlength=rows.count)
    if (counts < 2).any():
        few = int((counts < 2).nonzero()[0])
        raise ValueError(
            f"an interval over targets needs at least two targets in each group, but group number {few} has"
            f" {int(counts[few])} with a weight"
        )


def bounds(scores: Tensor, rows: Sums, mean: bool, confidence: float) -> tuple[Tensor, Tensor]:
    """The ends of the percentile bootstrap interval of each group's mean or sum.

    The targets of a group, each with its weight, are drawn with replacement, as many as there are. Targets whose weight
    is zero do not count.

    Args:
        scores: of all targets, shape ``(num_targets, num_columns)``.
        rows: the groups of targets.
        mean: whether it is the weighted mean, not the sum.
        confidence: probability that the interval holds the expected mean or sum, in (0, 1).

    Returns:
        The lower and the upper ends, of the dtype of the scores, shape ``(num_groups, num_columns)``.
    """
    ends = []
    for group in range(rows.count):
        members = ((rows.numbers == group) & (rows.weights != 0)).nonzero().flatten()
        values, weights = scores[members].double().T, rows.weights[members]
        if not mean:  # the mean of the terms, as many times as there are
            values, weights = values * weights * len(members), torch.ones_like(weights)
        parts = [bootstrap_interval(part, confidence, weights=weights) for part in torch.split(values, _COLUMNS)]
        ends.append(torch.cat(parts, dim=1))
    low, high = torch.stack(ends, dim=1).to(scores.dtype)
    return low, high


def with_bounds(found: Scores, ends: tuple[Tensor, Tensor], positions: Tensor | None = None) -> Interval:
    """Put scores and the ends of their intervals together.

    Args:
        found: the scores of groups, all or the best.
        ends: lower and upper ends, ``(num_groups, num_columns)``.
        positions: the index of each column, in order, if these are some columns alone.
    """
    low, high = (_at(found, end, positions) for end in ends)
    return Interval(found, low, high)


def _at(scores: Scores, end: Tensor, positions: Tensor | None) -> Scores:
    """The ends of the intervals of some scores, in their form."""

    def at(best: TopK) -> TopK:
        columns = best.indices if positions is None else torch.searchsorted(positions, best.indices)
        return TopK(end.gather(1, columns), best.indices)

    return end if isinstance(scores, Tensor) else each_end(scores, at)
