"""What people have found: positions of training examples in a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning_trak.storage.user_files import existing_path
from lightning_trak.texts.printable import shortened


def read_positions(path: str | Path) -> list[int]:
    """Positions of training examples, from the column ``position`` of a CSV file.

    A file of :meth:`~lightning_trak.cleaning.Ranking.to_csv` becomes a file of wrong labels when the rows with right
    ones are deleted. Columns may be separated as spreadsheets do: by commas, semicolons or tabs.

    Args:
        path: of the file, in UTF-8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or a position is not an integer.
    """
    place = existing_path(path, "give a CSV file with a column `position`, such as one that `clean` has written")
    try:
        content = place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f'"{place}" is not a CSV file in UTF-8: {error}; save it in UTF-8') from error
    usual = csv.field_size_limit(len(content))  # texts may be longer than usual
    try:
        return _positions(place, content.splitlines())
    finally:
        csv.field_size_limit(usual)


def _positions(place: Path, lines: list[str]) -> list[int]:
    head = lines[0] if lines else ""
    rows = csv.DictReader(lines, delimiter=next((mark for mark in ",;\t" if mark in head), ","))
    if "position" not in (rows.fieldnames or ()):
        raise ValueError(
            f'"{place}" has no column `position` in its first line, which is {shortened(head, 80)!r}; name the columns'
            " there"
        )
    positions = []
    for number, row in enumerate(rows, 2):
        text = (row["position"] or "").strip()
        if not text.isascii() or not text.isdigit():
            raise ValueError(
                f'"{place}" has {shortened(text, 40)!r} as the position of row {number}, not an integer; positions of'
                " training examples are counted from 0"
            )
        positions.append(int(text))
    return positions
