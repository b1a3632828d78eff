"""Small tables of results, for eyes, files and trackers."""

import csv
import io
from typing import NamedTuple

from lightning_trak.texts import printable

Cell = str | int | float

# What makes a spreadsheet take a cell for a formula; those in full width count in East Asian editions.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
# Marks of CommonMark and of Python-Markdown, which TensorBoard uses; the latter knows only entities for some of them.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "~": "&#126;"}
_MARKDOWN = str.maketrans(_ENTITIES | {mark: f"\\{mark}" for mark in "\\`*_[]|"})


class Table(NamedTuple):
    """Columns by name, and rows.

    Attributes:
        columns: names.
        rows: cells, as many in each as there are columns.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def markdown(self) -> str:
        """A Markdown table, with numbers rounded to four digits; texts are shown as they are, on one line."""
        head, *rows = (list(map(_written, line)) for line in (self.columns, *self.rows))
        return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))

    def csv(self) -> str:
        """Comma-separated values with a header: numbers in full, texts in quotes.

        A text that a spreadsheet would run as a formula begins with an apostrophe, which spreadsheets do not show.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerows([_defused(cell) for cell in line] for line in (self.columns, *self.rows))
        return text.getvalue().encode("utf-8", "backslashreplace").decode()  # a lone surrogate fits in no file


def _written(cell: Cell) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else printable(str(cell)).translate(_MARKDOWN)


def _defused(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
