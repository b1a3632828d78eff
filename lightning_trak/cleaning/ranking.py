"""Training examples in the order in which to look at them, for spreadsheets, tables and pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_trak.checks import needs_extra
from lightning_trak.metrics.functional import DetectionCurve, mislabel_detection_curve
from lightning_trak.reporting.explanations import Describe, described
from lightning_trak.reporting.items import item_label, item_text
from lightning_trak.reporting.plots import plot_mislabel_curves
from lightning_trak.scoring.groups import Label
from lightning_trak.storage.files import write_atomically
from lightning_trak.storage.user_files import new_file
from lightning_trak.texts.printable import counted, encodable, printable
from lightning_trak.texts.tables import Cell, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Ranking:
    """Training examples, those to look at first in front. A slice, such as ``ranking[:100]``, is a ranking too.

    Attributes:
        what: what the first ones are, such as ``"wrong labels"``.
        measure: what the scores are, such as ``"suspicion"``.
        positions: in the training set, int64, shape ``(len(self),)``.
        scores: float64, shape ``(len(self),)``. Of equal ones, the first in the training set comes first.
        dataset: the training set. An item is read only where a label or a text is needed.
        groups: the group of each example; None if there are no groups.
    """

    what: str
    measure: str
    positions: Tensor
    scores: Tensor
    dataset: Any
    groups: tuple[Label, ...] | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.positions)

    def __getitem__(self, part: slice) -> Ranking:
        """Some of the examples, such as the first hundred."""
        if not isinstance(part, slice):
            raise TypeError(f"a ranking takes slices, such as ranking[:100], got {part!r:.80}")
        groups = None if self.groups is None else self.groups[part]
        return replace(self, positions=self.positions[part], scores=self.scores[part], groups=groups)

    def __repr__(self) -> str:
        return (
            f"Ranking({counted(len(self), 'training example')} of {len(self.dataset)}: {self.what}, by {self.measure})"
        )

    def table(self, describe: Describe | None = None) -> Table:
        """The examples as a small table, whose ``markdown()`` and ``csv()`` are harmless texts.

        Args:
            describe: makes a text of an item. Default: the strings and numbers of an item that holds a string.

        Returns:
            A row for each example: its position and score; its group, label and text, if there are any. The label is
            the last element of a tuple if that is a number, or what a mapping has under ``"label"`` or ``"labels"``; of
            several labels as zeros and ones, the positions of the ones.

        Raises:
            TypeError: if ``describe`` returns something other than a str.
        """
        columns = self._columns(describe)
        rows = [tuple(map(_cell, row)) for row in zip(*columns.values(), strict=True)]
        return Table(tuple(columns), rows)

    def to_csv(self, path: str | os.PathLike[str], describe: Describe | None = None) -> None:
        """Write the examples to a CSV file, which replaces one that is there.

        Spreadsheets may open it: texts are on one line, without control characters, and no text becomes a formula,
        because those that could have an apostrophe in front. :meth:`to_parquet` keeps texts as they are.

        Args:
            path: of the file.
            describe: as for :meth:`table`.

        Raises:
            TypeError: if ``describe`` returns something other than a str.
            ValueError: if the path is a URL.
        """
        text = self.table(describe).csv()
        write_atomically(new_file(path), lambda file: file.write_text(text, encoding="utf-8", newline=""))

    def to_parquet(self, path: str | os.PathLike[str], describe: Describe | None = None) -> None:
        """Write the examples to a Parquet file, which replaces one that is there. Needs the extra ``parquet``.

        Args:
            path: of the file.
            describe: as for :meth:`table`.

        Raises:
            ModuleNotFoundError: if pyarrow is not installed.
            TypeError: if ``describe`` returns something other than a str.
            ValueError: if the path is a URL.
        """
        with needs_extra("parquet", "Parquet files, other than CSV files, need pyarrow"):
            import pyarrow as pa
            from pyarrow import parquet
        place = new_file(path)
        columns = {name: _of_one_type(cells) for name, cells in self._columns(describe).items()}
        types = {"position": pa.int64(), "score": pa.float64()}
        table = pa.table({name: pa.array(cells, types.get(name)) for name, cells in columns.items()})
        write_atomically(place, lambda file: parquet.write_table(table, file))

    def curve(self, wrong: Tensor | Sequence[int]) -> DetectionCurve:
        """How many of the examples that are known to be wrong are found when examples are inspected in this order.

        Examples that the ranking lacks come after those that it has, in a random order.

        Args:
            wrong: the examples that are wrong: a bool Tensor ``(num_train,)``, or positions.

        Raises:
            ValueError: if no example is wrong, or all are, or a position is out of range.
        """
        flags = _as_flags(wrong, len(self.dataset))
        # Neighbours with equal scores are inspected in a random order, and so are examples that are not listed.
        starts = torch.ones(len(self), dtype=torch.bool)
        starts[1:] = self.scores[1:] != self.scores[:-1]
        suspicion = torch.full((len(self.dataset),), -torch.inf, dtype=torch.float64)
        suspicion[self.positions] = -starts.cumsum(0).double()
        return mislabel_detection_curve(suspicion, flags)

    def plot(self, wrong: Tensor | Sequence[int], name: str | None = None) -> Figure:
        """Draw how many wrong examples are found against how many are inspected. Needs the extra ``plots``.

        :func:`~lightning_trak.reporting.plots.plot_mislabel_curves` draws the :meth:`curve` of several rankings.

        Args:
            wrong: as for :meth:`curve`.
            name: of the line, such as the name of the method. Default: :attr:`measure`.

        Raises:
            ValueError: as :meth:`curve`.
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return plot_mislabel_curves({name or self.measure: self.curve(wrong)})

    def _columns(self, describe: Describe | None) -> dict[str, list[Any]]:
        """The columns by name. Those with nothing in them are left out."""
        labels, texts = [], []
        for position in self.positions.tolist():
            item = self.dataset[position]
            labels.append(item_label(item))
            texts.append(item_text(item) if describe is None else described(describe, item))
        columns: dict[str, list[Any]] = {"position": self.positions.tolist(), "score": self.scores.tolist()}
        optional: dict[str, list[Any]] = {"group": list(self.groups or ()), "label": labels, "text": texts}
        return columns | {name: cells for name, cells in optional.items() if any(cell is not None for cell in cells)}


def _cell(value: int | float | str | None) -> Cell:
    return "" if value is None else printable(value) if isinstance(value, str) else value


def _of_one_type(cells: list[Any]) -> list[Any]:
    """Labels and texts for a column of one type: texts, unless all are numbers."""
    if all(isinstance(cell, (int, float, type(None))) for cell in cells):
        mixed = any(isinstance(cell, float) for cell in cells)
        return [float(cell) if mixed and cell is not None else cell for cell in cells]
    return [None if cell is None else encodable(str(cell)) for cell in cells]


def _as_flags(wrong: Tensor | Sequence[int], count: int) -> Tensor:
    try:
        given = torch.as_tensor(wrong).cpu()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"expected wrong as bools or as positions, got {wrong!r:.80}") from error
    if given.dtype == torch.bool:
        if given.shape != (count,):
            raise ValueError(f"expected wrong as a bool for each of {count} examples, got shape {tuple(given.shape)}")
        return given
    if given.ndim != 1 or (len(given) and given.is_floating_point()):
        raise ValueError(f"expected wrong as bools or as positions, got {given.dtype} of shape {tuple(given.shape)}")
    outside = (given < 0) | (given >= count)
    if outside.any():
        position = given[outside][0].item()
        raise ValueError(f"wrong names example {position}, and there are {count}, from 0 to {count - 1}")
    flags = torch.zeros(count, dtype=torch.bool)
    flags[given.long()] = True
    return flags
