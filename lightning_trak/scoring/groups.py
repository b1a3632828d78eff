"""Groups of targets or of training examples, and sums of scores over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_trak.checks import require_one_of, require_tensor
from lightning_trak.running.chunks import chunked
from lightning_trak.texts.printable import counted

Aggregate = Literal["mean", "sum"]
Label = int | str
Labels = Sequence[Label | None] | Tensor


class Groups:
    """Which group each example of a dataset is in, and how much it weighs there.

    Args:
        labels: the group of each example, in the order of the dataset: integers or texts, as a sequence, or a Tensor of
            integers. An example with None is in no group.
        weights: how much each example weighs, finite; default: 1 each.
        names: the labels in the order that the groups shall have; default: all labels, sorted.

    Attributes:
        names: the label of each group. Rows or columns of scores are in this order.
        numbers: for each example the number of its group, or -1, int64, shape ``(n,)``.
        weights: float64, shape ``(n,)``.

    Raises:
        TypeError: if a label is neither an integer nor a text nor None, or they are mixed.
        ValueError: if a label is not one of ``names``, a group is empty, or the weights are not n finite numbers.

    Example:
        >>> Groups(["web", "books", "web"]).names
        ('books', 'web')
    """

    def __init__(self, labels: Labels, weights: Any = None, names: Sequence[Label] | None = None) -> None:
        given = _as_list(labels)
        present = {label for label in given if label is not None}
        if len({type(label) for label in present}) > 1:
            raise TypeError("expected the labels of groups as integers or as texts, got both")
        self.names: tuple[Label, ...] = tuple(sorted(present) if names is None else names)
        places = {name: number for number, name in enumerate(self.names)}
        if len(places) < len(self.names):
            raise ValueError(f"names of groups must differ, got {list(self.names)!r:.200}")
        unknown = next((place for place, label in enumerate(given) if label is not None and label not in places), None)
        if unknown is not None:
            raise ValueError(
                f"the label of example {unknown} is {given[unknown]!r}, which is not among the names"
                f" {list(self.names)!r:.200}"
            )
        empty = [name for name in self.names if name not in present]
        if empty:
            raise ValueError(f"group {empty[0]!r} has no examples: leave it out of names")
        if not present:
            raise ValueError("there are no groups, as no example has a label; at least one is needed")
        self.numbers = torch.tensor([-1 if label is None else places[label] for label in given], dtype=torch.int64)
        self.weights = torch.ones(len(given), dtype=torch.float64)
        if weights is not None:
            self.weights = torch.as_tensor(weights).detach().cpu().to(torch.float64)
            if self.weights.shape != (len(given),):
                raise ValueError(
                    f"expected {len(given)} weights, one for each label, got shape {tuple(self.weights.shape)}"
                )
            bad = ~self.weights.isfinite()
            if bad.any():
                first = int(bad.nonzero()[0])
                raise ValueError(f"the weight of example {first} is {float(self.weights[first])}, not a finite number")

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.names)

    @property
    def sizes(self) -> Tensor:
        """The number of examples in each group, int64, shape ``(len(self),)``."""
        return self.numbers[self.numbers >= 0].bincount(minlength=len(self))

    def averaging(self) -> Tensor:
        """The weights divided by the sum of weights of the example's group.

        Raises:
            ValueError: if a weight is negative, or the weights of a group are all zero.
        """
        inside = self.numbers >= 0
        totals = torch.zeros(len(self), dtype=torch.float64)
        totals.index_add_(0, self.numbers[inside], self.weights[inside])
        if (self.weights[inside] < 0).any():
            raise ValueError('a mean needs weights of at least 0; aggregate="sum" takes negative ones')
        if (totals == 0).any():
            raise ValueError(
                f"the weights of group {self.names[int((totals == 0).nonzero()[0])]!r} are all zero, so that it has no"
                ' mean: give a positive weight, or use aggregate="sum"'
            )
        shares = torch.zeros_like(self.weights)
        shares[inside] = self.weights[inside] / totals[self.numbers[inside]]
        return shares


class Sums:
    """Sums of rows or columns into fewer ones: entry i is added to number ``numbers[i]``, ``weights[i]`` times.

    Args:
        numbers: where each entry goes, or -1 to leave it out, int64, shape ``(n,)``.
        weights: float64, shape ``(n,)``.
        count: how many sums there are.
    """

    def __init__(self, numbers: Tensor, weights: Tensor, count: int) -> None:
        self.numbers, self.weights, self.count = numbers, weights, count

    def added(self, matrix: Tensor, dim: int) -> Tensor:
        """The sums of the rows (``dim`` 0) or columns (1) of a whole matrix, float64."""
        shape = [self.count, matrix.shape[1]] if dim == 0 else [len(matrix), self.count]
        totals = torch.zeros(shape, dtype=torch.float64)
        self.add_(totals, matrix, slice(None), dim)
        return totals

    def add_(self, totals: Tensor, part: Tensor, which: slice | Tensor, dim: int) -> None:
        """Add some entries to float64 totals.

        Args:
            totals: of size ``count`` in ``dim``.
            part: the entries, in ``dim``.
            which: which entries they are.
            dim: 0 for rows, 1 for columns.
        """
        numbers = self.numbers[which]
        inside = (numbers >= 0).nonzero().flatten()
        weights = self.weights[which][inside].to(part.device)
        chosen = part.index_select(dim, inside.to(part.device)).double()
        totals.index_add_(
            dim, numbers[inside].to(part.device), chosen * (weights.unsqueeze(1) if dim == 0 else weights)
        )


class RowBlock(NamedTuple):
    """Some rows of scores, and the targets that are added up in them.

    Attributes:
        span: which rows.
        members: positions of the targets.
        numbers: for each of these, its row, counted from the first of the span, int64, shape ``(len(members),)``.
        weights: float64, of the same shape.
    """

    span: range
    members: list[int]
    numbers: Tensor
    weights: Tensor

    def total(self, parts: Iterable[Tensor]) -> Tensor:
        """Add up a tensor with a row for each member.

        Args:
            parts: its rows, in order: at least one part.

        Returns:
            Shape ``(len(span), ...)``.
        """
        start, found = 0, None
        for part in parts:
            found = part.new_zeros(len(self.span), *part.shape[1:]) if found is None else found
            some = slice(start, start + len(part))
            weights = self.weights[some].to(part.dtype).to(part.device).view(-1, *[1] * (part.ndim - 1))
            found.index_add_(0, self.numbers[some].to(part.device), part * weights)
            start += len(part)
        assert found is not None
        return found


def row_blocks(rows: Sums | None, count: int, at_once: int) -> Iterator[RowBlock]:
    """Cut rows of scores into blocks.

    Args:
        rows: how targets are added up; None: each has a row.
        count: the number of targets.
        at_once: rows in a block, at most.
    """
    if rows is None:
        rows = Sums(torch.arange(count), torch.ones(count, dtype=torch.float64), count)
    for span in chunked(range(rows.count), at_once):
        members = ((rows.numbers >= span.start) & (rows.numbers < span.stop)).nonzero().flatten()
        yield RowBlock(span, members.tolist(), rows.numbers[members] - span.start, rows.weights[members])


class Collected:
    """A matrix of scores that comes in parts, whose columns may be added up.

    Args:
        num_rows: how many rows it has.
        num_columns: how many training examples have scores.
        columns: how these are added up; None: each has a column.
        dtype: of the scores.
    """

    def __init__(self, num_rows: int, num_columns: int, columns: Sums | None, dtype: torch.dtype) -> None:
        self._columns, self._dtype = columns, dtype
        shape = (num_rows, num_columns) if columns is None else (num_rows, columns.count)
        self._totals = torch.zeros(shape, dtype=dtype if columns is None else torch.float64)

    def add(self, span: range, positions: Sequence[int], part: Tensor) -> None:
        """Add to some rows.

        Args:
            span: which rows.
            positions: of training examples.
            part: shape ``(len(span), len(positions))``.
        """
        rows, part = self._totals[span.start : span.stop], part.cpu()
        examples = torch.as_tensor(positions, dtype=torch.int64)
        if self._columns is None:
            rows.index_add_(1, examples, part.to(self._dtype))
        else:
            self._columns.add_(rows, part, examples, 1)

    def scores(self) -> Tensor:
        """What was added up."""
        return self._totals.to(self._dtype)


def require_groups(name: str, groups: Groups | Labels, count: int, what: str) -> Groups:
    """The groups of a dataset.

    Args:
        name: of the argument, for errors.
        groups: what the user gave.
        count: the number of examples.
        what: their name in errors.

    Raises:
        ValueError: if there is not one label for each example.
    """
    found = groups if isinstance(groups, Groups) else Groups(groups)
    if len(found.numbers) != count:
        labels = counted(len(found.numbers), "label")
        raise ValueError(f"{name} has {labels}, and there are {count} {what}: give one for each")
    return found


def target_sums(aggregate: Aggregate | None, groups: Groups | Labels | None, count: int) -> Sums | None:
    """How the scores of targets are added up; None: not at all.

    Raises:
        ValueError: if the arguments do not fit together, or the number of targets.
    """
    if aggregate is None:
        if groups is not None:
            raise ValueError('groups needs aggregate="mean" or aggregate="sum": what to make of the targets of a group')
        return None
    require_one_of("aggregate", aggregate, ("mean", "sum"))
    if groups is None:
        groups = Groups(torch.zeros(count, dtype=torch.int64))
    groups = require_groups("groups", groups, count, "targets")
    return Sums(groups.numbers, groups.weights if aggregate == "sum" else groups.averaging(), len(groups))


def train_sums(groups: Groups | Labels | None, count: int) -> Sums | None:
    """How the scores of training examples are added up; None: not at all.

    Raises:
        ValueError: if there is not one label for each training example.
    """
    if groups is None:
        return None
    groups = require_groups("train_groups", groups, count, "training examples")
    return Sums(groups.numbers, groups.weights, len(groups))


def aggregate_scores(
    scores: Tensor,
    aggregate: Aggregate | None = None,
    groups: Groups | Labels | None = None,
    train_groups: Groups | Labels | None = None,
) -> Tensor:
    """Add up a matrix of scores, of any method, over groups of targets and of training examples.

    Args:
        scores: shape ``(num_targets, num_train)``.
        aggregate: ``"mean"`` or ``"sum"`` of the targets of each group; None: each target has a row.
        groups: of the targets; default: one group of all.
        train_groups: of the training examples, whose scores are summed; default: each has a column.

    Returns:
        float64, a row for each group of targets, a column for each group of training examples.

    Raises:
        ValueError: if the scores are not a matrix, or the groups do not fit.

    Example:
        >>> aggregate_scores(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "mean")
        tensor([[2., 4.]], dtype=torch.float64)
    """
    require_tensor("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"expected scores of shape (num_targets, num_train), got {tuple(scores.shape)}")
    rows, columns = target_sums(aggregate, groups, len(scores)), train_sums(train_groups, scores.shape[1])
    return added_up(scores.double().cpu(), rows, columns)


def added_up(scores: Tensor, rows: Sums | None, columns: Sums | None) -> Tensor:
    """A whole matrix on the CPU, or sums of its rows and columns in float64."""
    for dim, sums in enumerate((rows, columns)):
        scores = scores if sums is None else sums.added(scores, dim)
    return scores


def _as_list(labels: Any) -> list[Label | None]:
    if isinstance(labels, np.ndarray) and labels.dtype == object and labels.ndim == 1:
        labels = labels.tolist()  # as a column of texts in pandas
    if isinstance(labels, (Tensor, np.ndarray)):
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
        if array.ndim != 1 or array.dtype.kind not in "iuU":
            raise TypeError(
                f"expected labels of groups as integers or texts, one each, got {array.dtype} of shape {array.shape}"
            )
        return list(array.tolist())
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Sequence):
        raise TypeError(
            f"expected labels of groups as a sequence or a Tensor of integers, got a {type(labels).__name__}"
        )
    found: list[Label | None] = [label.item() if isinstance(label, np.generic) else label for label in labels]
    for place, label in enumerate(found):
        if label is not None and (isinstance(label, bool) or not isinstance(label, (int, str))):
            raise TypeError(f"the label of example {place} is {label!r:.80}; expected an integer, a text or None")
    return found
