"""Parts of messages: the first of many names, names with reasons, and an error in one line."""

from collections.abc import Mapping, Sequence


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names with commas between them; ``...`` stands for those after the first few.

    Args:
        names: the names.
        most: how many are named.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b, ...'
    """
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def with_reasons(reasons: Mapping[str, str]) -> str:
    """Names, each with its reason."""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def in_one_line(error: Exception) -> str:
    """The type of an error and the first line of its message, of at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
