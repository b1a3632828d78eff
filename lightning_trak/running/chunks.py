"""Sequences in pieces of one size."""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

Items = TypeVar("Items", bound=Sequence[Any])


def chunked(items: Items, size: int) -> list[Items]:
    """Cut a sequence, such as a range, into pieces of ``size`` items. The last one may be shorter.

    Args:
        items: the sequence.
        size: of a piece, at least 1.

    Example:
        >>> chunked(range(5), 2)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [cast(Items, items[start : start + size]) for start in range(0, len(items), size)]
