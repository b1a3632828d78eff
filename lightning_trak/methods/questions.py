"""What users ask of scores, checked against the data."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from lightning_trak.checks import is_integer
from lightning_trak.methods.examples import Examples
from lightning_trak.outputs import ModelOutput
from lightning_trak.running.data.sources import Data
from lightning_trak.scoring.groups import Aggregate, Groups, Labels, Sums, target_sums, train_sums
from lightning_trak.scoring.intervals import require_resampling
from lightning_trak.scoring.topk import Scores, TopK, each_end

Positions = Sequence[int] | Tensor

_MOST = 0.999  # of 2,000 bootstrap replicates, one lies beyond either end


class Question(TypedDict, total=False):
    """What ``score`` answers, beside the score of each target for each training example.

    Attributes:
        output: the output of the targets, if it is not that of the training examples, such as
            ``ClassificationMargin(labels="predicted")``, or ``CausalLMMargin(per_token=True)``: a row for each token.
        aggregate: ``"mean"`` or ``"sum"`` of the scores of targets: a row for each group of them.
        groups: the group of each target: labels, or :class:`~lightning_trak.scoring.Groups`, which have weights, too;
            default: all targets are one group.
        train_groups: the group of each training example, likewise. A column is the sum of a group's scores, each
            multiplied by its weight.
    """

    output: ModelOutput | None
    aggregate: Aggregate | None
    groups: Groups | Labels | None
    train_groups: Groups | Labels | None


class AttributedQuestion(Question, total=False):
    """What ``attribute`` answers.

    Attributes:
        candidates: examples that are not in the training set, to score the targets against in its place, as if they
            were added to it.
    """

    candidates: Data | None


class Asked(NamedTuple):
    """A question, checked against the data.

    Attributes:
        output: the output of the targets; None: that of the training examples.
        rows: how targets are added up; None: each has a row.
        columns: how training examples, or candidates, are added up; None: each has a column.
        candidates: what is scored in the place of the training examples.
    """

    output: ModelOutput | None
    rows: Sums | None
    columns: Sums | None
    candidates: Examples | None

    def num_rows(self, num_targets: int) -> int:
        """How many rows the scores have."""
        return num_targets if self.rows is None else self.rows.count


def require_ends(top_k: int | None, largest: bool | None) -> None:
    """Check which scores are kept.

    Raises:
        TypeError: if one of them is of another type.
        ValueError: if the two do not fit together.
    """
    if top_k is not None and not is_integer(top_k):
        raise TypeError(f"top_k is a number of training examples, got a {type(top_k).__name__}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if largest is not None and not isinstance(largest, bool):  # 0 == False
        raise TypeError(f"largest is True, False or None for both ends, got {largest!r:.80}")
    if top_k is None and largest is not None:
        raise ValueError(f"largest={largest} says which end of the scores top_k= keeps: say how many with top_k=")


def require_interval(interval: float | None, rows: Sums | None) -> None:
    """Check an interval over targets.

    Raises:
        ValueError: if it is out of range, or there is no mean or sum over at least two targets.
    """
    if interval is None:
        return
    if not isinstance(interval, (int, float)) or not 0 < interval <= _MOST:
        raise ValueError(f"interval is a confidence level between 0 and {_MOST}, such as 0.95, got {interval!r:.80}")
    if rows is None:
        raise ValueError('interval is for means or sums over targets: give aggregate="mean" or aggregate="sum" too')
    require_resampling(rows)


class Columns(NamedTuple):
    """Which columns scores have, if it is not one for each training example.

    Attributes:
        sums: how training examples are added up.
        positions: the training example of each column; None: columns are groups.
    """

    sums: Sums
    positions: Tensor | None

    def named(self, scores: Scores) -> Scores:
        """The scores, with positions of training examples in the place of numbers of columns."""
        if self.positions is None or isinstance(scores, Tensor):
            return scores
        positions = self.positions
        return each_end(scores, lambda end: TopK(end.values, positions[end.indices]))


def is_positions(train: Any) -> bool:
    """Whether this names training examples by position: integers in a range, sequence, Tensor or array."""
    if isinstance(train, (range, Tensor, np.ndarray)):
        return True
    return isinstance(train, (list, tuple)) and all(isinstance(item, (int, np.integer)) for item in train)


def target_rows(question: Question, counts: Sequence[int]) -> list[Sums | None]:
    """How the scores of each set of targets are added up.

    Args:
        question: what is asked.
        counts: the number of targets in each set.

    Raises:
        ValueError: if the groups do not fit the targets.
    """
    groups = question.get("groups")
    if groups is not None and len(counts) > 1:
        raise ValueError(f"groups takes one set of targets, got {len(counts)}; join them with a ConcatDataset")
    return [target_sums(question.get("aggregate"), groups, count) for count in counts]


def train_columns(positions: Any, groups: Groups | Labels | None, count: int) -> Columns | None:
    """Which columns the scores have; None: one for each training example.

    Args:
        positions: the training examples to score; None: all.
        groups: of all training examples.
        count: the number of training examples.

    Raises:
        TypeError: if positions are not integers.
        ValueError: if a position is out of range or named twice, there is none, or both arguments are given.
    """
    if positions is None:
        sums = train_sums(groups, count)
        return None if sums is None else Columns(sums, None)
    if groups is not None:
        raise ValueError("give train or train_groups, not both: a training example with the label None is in no group")
    chosen = _as_positions(positions, count)
    numbers = torch.full((count,), -1, dtype=torch.int64)
    numbers[chosen] = torch.arange(len(chosen))
    return Columns(Sums(numbers, torch.ones(count, dtype=torch.float64), len(chosen)), chosen)


def _as_positions(positions: Any, count: int) -> Tensor:
    if getattr(positions, "ndim", 1) != 1:
        raise TypeError(
            f"train takes positions as integers in one dimension, got shape {tuple(positions.shape)}; for examples give"
            " a Dataset or DataLoader, such as TensorDataset(inputs, labels)"
        )
    try:
        chosen = [operator.index(position) for position in positions]
    except TypeError as error:
        raise TypeError(f"train takes positions as integers, got {positions!r:.80}") from error
    if any(isinstance(position, (bool, np.bool_)) for position in positions) or getattr(positions, "dtype", None) in (
        torch.bool,
        np.dtype(bool),
    ):
        raise TypeError("train takes positions as integers, not a mask: use mask.nonzero().flatten()")
    if not chosen:
        raise ValueError("train names no training example; leave it out for all")
    wrong = next((position for position in chosen if not 0 <= position < count), None)
    if wrong is not None:
        raise ValueError(f"train names training example {wrong}, and there are {count}, from 0 to {count - 1}")
    if len(set(chosen)) < len(chosen):
        twice = next(position for position, times in Counter(chosen).items() if times > 1)
        raise ValueError(f"train names training example {twice} twice")
    return torch.tensor(chosen, dtype=torch.int64)
