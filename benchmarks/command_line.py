"""What the benchmarks of the LDS have in common: their options, and tables that grow by a line at a time."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.truth import quiet


def options(description: str, out: str, quick: str | None = None) -> argparse.ArgumentParser:
    """The options that all have.

    Args:
        description: the docstring of the benchmark. Its first line is shown.
        out: the folder that everything is written to by default.
        quick: what ``--quick`` does; None: there is no such option.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(out), help="where everything is written")
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def begin(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, one_thread: bool = True
) -> argparse.Namespace:
    """Read the command line, make the folder, and silence log lines.

    Args:
        parser: made by :func:`options`.
        arguments: of the command line; None: those of the process.
        one_thread: whether the nets are too small for more threads.
    """
    parsed = parser.parse_args(arguments)
    quiet()
    if one_thread:
        torch.set_num_threads(1)
    parsed.out.mkdir(parents=True, exist_ok=True)
    return parsed


def save(found: Sequence[Any], path: Path, table: Callable[[Any], str]) -> None:
    """Write results to ``path`` with the endings .json and .md, and print the last line of their table.

    Args:
        found: dataclasses, one for each line.
        path: of the files, without an ending.
        table: makes a table of results in Markdown.
    """
    path.with_suffix(".json").write_text(json.dumps(list(map(asdict, found)), indent=1))
    path.with_suffix(".md").write_text(table(found))
    print(table(found[-1:]).splitlines()[-1], flush=True)


def difference(mean: float, low: float, high: float) -> str:
    """A difference with its interval, as a cell of a table."""
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
