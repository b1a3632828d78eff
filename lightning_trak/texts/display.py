"""How objects show themselves: one line in a terminal, a small table in a notebook. Nothing here raises."""

import html
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

from lightning_trak.texts.printable import counted, printable, shortened

_LONGEST = 60  # characters of a value
_TARGETS, _EXAMPLES = 10, 5  # of a table


class Displayed:
    """Shows some of its attributes: all those named in ``_shown`` that are there and not None.

    No file is read: only what the object holds counts, so that also one whose ``__init__`` has failed can be shown.
    """

    _shown: ClassVar[tuple[str, ...]] = ()  # a dot leads to an attribute of an attribute, which gives its own name

    def __repr__(self) -> str:
        return _line(type(self).__name__, _facts(self, self._shown))

    def _repr_html_(self) -> str:
        return _table(type(self).__name__, [(name, [value]) for name, value in _facts(self, self._shown).items()])


def tuple_line(fields: Any) -> str:
    """A named tuple in one line, with shapes in the place of tensors."""
    return _line(type(fields).__name__, _facts(fields, fields._fields))


def best_line(best: Any, ends: Mapping[str, Any]) -> str:
    """The best training examples of targets in one line: how many there are, and the first ones of the first target.

    Args:
        best: a named tuple, whose name stands in front.
        ends: ``values`` and ``indices`` of shape ``(num_targets, k)``, by the name of the end of the scores, which may
            be empty.
    """
    name = type(best).__name__
    try:
        num_targets = _size(ends)
        first = [(f"{end} " if end else "") + ", ".join(_cells(top, 0, 3)) for end, top in ends.items() if num_targets]
        return f"{name}({'; '.join([counted(num_targets, 'target'), *first])}{', ...' if first else ''})"
    except Exception:  # a repr never raises, whatever the fields hold
        return tuple.__repr__(best)


def best_table(best: Any, ends: Mapping[str, Any]) -> str:
    """The best training examples of the first targets as a small table in HTML; arguments as for :func:`best_line`."""
    try:
        num_targets = _size(ends)
        rows = [
            (f"target {target}", [cell for top in ends.values() for cell in _cells(top, target, _EXAMPLES)])
            for target in range(min(_TARGETS, num_targets))
        ]
        widths = {end: min(_EXAMPLES, top.values.shape[1]) for end, top in ends.items() if end}
        most = max((top.values.shape[1] for top in ends.values()), default=0)
        shown = [
            f"the first {len(rows)} of them" if len(rows) < num_targets else "",
            f"the first {_EXAMPLES} of {most} examples each" if most > _EXAMPLES else "",
        ]
        title = ", ".join([f"{type(best).__name__}: {counted(num_targets, 'target')}", *filter(None, shown)])
        return _table(title, rows, widths)
    except Exception:
        return f"<pre>{html.escape(tuple.__repr__(best))}</pre>"


def _size(ends: Mapping[str, Any]) -> int:
    return len(next(iter(ends.values())).values)


def _cells(top: Any, target: int, count: int) -> list[str]:
    """The first training examples of a target, each as its position and score."""
    indices, values = top.indices[target][:count].tolist(), top.values[target][:count].tolist()
    return [f"#{index} {value:+.3g}" for index, value in zip(indices, values, strict=True)]


def _facts(holder: Any, names: Sequence[str]) -> dict[str, str]:
    """Attributes in a few words. One that is not there yet is left out."""
    found = {}
    for name in names:
        with suppress(Exception):
            value = attrgetter(name)(holder)
            if value is not None:
                found[name.rpartition(".")[2]] = _short(value)
    return found


def _short(value: Any) -> str:
    """A value in a few words: a plain one as it is, anything large by its size, anything else by its name."""
    if isinstance(value, os.PathLike):  # one below the working directory is shorter without it
        below = Path(value).is_relative_to(Path.cwd())
        value = os.path.relpath(value) if below else os.fspath(value)
    if isinstance(value, (str, bool, int, float)):
        return shortened(repr(value), _LONGEST)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return shortened(", ".join(map(str, value)), _LONGEST)
    if hasattr(value, "_fields"):
        return shortened(repr(value), _LONGEST)
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, (str, int, float, os.PathLike)) for item in value):
            return shortened(f"[{', '.join(map(_short, value))}]", _LONGEST)
        return _short(value[0]) if len(value) == 1 else str(len(value))
    if isinstance(getattr(value, "name", None), str):
        return shortened(value.name, _LONGEST)
    if isinstance(getattr(value, "path", None), os.PathLike):
        return _short(value.path)
    if is_dataclass(value) and not isinstance(value, type) and len(repr(value)) <= _LONGEST:
        return repr(value)
    return str(getattr(value, "__name__", type(value).__name__))


def _line(name: str, facts: Mapping[str, str]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in facts.items())})"


def _table(title: str, rows: Sequence[tuple[str, Sequence[str]]], widths: Mapping[str, int] | None = None) -> str:
    """A table in HTML, with a heading for each row, and for groups of columns of these widths."""
    heads = "".join(f'<th colspan="{width}">{html.escape(name)}</th>' for name, width in (widths or {}).items())
    lines = [f"<tr><td></td>{heads}</tr>"] if heads else []
    for name, cells in rows:
        content = "".join(f'<td style="text-align: left">{html.escape(printable(cell))}</td>' for cell in cells)
        lines.append(f'<tr><th style="text-align: left">{html.escape(name)}</th>{content}</tr>')
    return f"<table><caption>{html.escape(title)}</caption>{''.join(lines)}</table>"
