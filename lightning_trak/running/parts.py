"""Parts of a work, for processes that share it without knowing of each other."""

from collections.abc import Sequence
from typing import TypeVar

from lightning_trak.checks import positive

T = TypeVar("T")
Part = str | tuple[int, int]


def share(items: Sequence[T], part: Part | None) -> list[T]:
    """Every n-th item, so that any number of finished parts is spread over the whole.

    Args:
        items: all of the work. It must not depend on what is done already.
        part: ``"3/16"`` or ``(3, 16)``: the third of sixteen parts; None: all of them.

    Raises:
        ValueError: if there is no such part.
    """
    if part is None:
        return list(items)
    try:
        numbers = map(int, part.split("/")) if isinstance(part, str) else part
        number, count = (positive("part", number) for number in numbers)
    except (ValueError, TypeError):
        number, count = 0, 0
    if not 1 <= number <= count:
        raise ValueError(f'part must be "i/n" or (i, n) with 1 <= i <= n, got {part!r}')
    return list(items[number - 1 :: count])
