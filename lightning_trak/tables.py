"""Small tables of results, for eyes, files and trackers."""

import csv
import io
from typing import NamedTuple

Cell = str | int | float


class Table(NamedTuple):
    """Columns by name, and rows.

    Attributes:
        columns: names.
        rows: cells, as many in each as there are columns.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def markdown(self) -> str:
        """A Markdown table, with numbers rounded to four digits."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(map(_written, line)) + " |" for line in lines)

    def csv(self) -> str:
        """Comma-separated values with a header, numbers in full."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def _written(cell: Cell) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ")
