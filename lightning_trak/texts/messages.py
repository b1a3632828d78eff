"""Parts of messages: the first of many names, names with reasons, an error in one line, and the extremes of numbers."""

from collections.abc import Mapping, Sequence


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, with commas between them, and the number of the others.

    Args:
        names: the names.
        most: how many are named.

    Example:
        >>> listed(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def with_reasons(reasons: Mapping[str, str]) -> str:
    """Names, each with its reason."""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def in_one_line(error: Exception) -> str:
    """The type of an error and the first line of its message, of at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def extremes(values: Sequence[float], digits: int = 2) -> str:
    """The smallest and the largest number; or one, if both are rounded to the same.

    Args:
        values: the numbers.
        digits: how many are shown of each.

    Example:
        >>> extremes([0.5, 1.25, 0.75])
        '0.5 to 1.2'
    """
    return " to ".join(dict.fromkeys(f"{value:.{digits}g}" for value in (min(values), max(values))))
