"""Small tables of results, as Markdown and as CSV."""

import csv
import io
from typing import NamedTuple

from lightning_trak.texts.printable import encodable, printable, shortened

Cell = str | int | float

# A spreadsheet takes a cell for a formula if it begins with one of these. The last four are the first four in full
# width, which East Asian editions accept.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
# Marks of CommonMark and of Python-Markdown, which TensorBoard uses. Python-Markdown needs entities for some of them.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "~": "&#126;"}
_MARKDOWN = str.maketrans(_ENTITIES | {mark: f"\\{mark}" for mark in "\\`*_[]|"})


class Table(NamedTuple):
    """A table with named columns.

    Attributes:
        columns: the names.
        rows: of each row, a cell for each column.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def markdown(self) -> str:
        """The table in Markdown. Floats are rounded to four digits; texts are shown as they are, on one line."""
        head, *rows = (list(map(_markdown_cell, line)) for line in (self.columns, *self.rows))
        return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))

    def plain(self, width: int = 100) -> str:
        """The table as lines of text for a terminal, with columns under each other.

        Args:
            width: of the lines, in characters. The last column is shortened to fit, if there is room for any of it.
        """
        *columns, last = zip(self.columns, *(map(_plain_cell, row) for row in self.rows), strict=True)
        widths = [max(map(len, column)) for column in columns]
        room = max(3, width - sum(widths) - 2 * len(widths))
        ends = [shortened(cell, room) for cell in last]
        lines = [[*map(str.rjust, line, widths), end] for *line, end in zip(*columns, ends, strict=True)]
        return "\n".join(map("  ".join, lines))

    def csv(self) -> str:
        """The table as comma-separated values with a header. Numbers are in full, texts in quotes.

        A spreadsheet would run some texts as formulas. They get an apostrophe in front, which spreadsheets do not show.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerows([_csv_cell(cell) for cell in line] for line in (self.columns, *self.rows))
        return encodable(text.getvalue())


def _plain_cell(cell: Cell) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else printable(str(cell))


def _markdown_cell(cell: Cell) -> str:
    return _plain_cell(cell).translate(_MARKDOWN)


def _csv_cell(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
