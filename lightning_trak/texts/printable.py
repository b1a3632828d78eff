"""Texts of the user's data, made safe to show, and plural words."""

import unicodedata

# These marks change the direction of the text around them (Unicode's bidirectional algorithm, UAX 9).
_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSAFE = frozenset(("Cc", "Cs"))  # control characters, and lone surrogates, which UTF-8 cannot encode


def printable(text: str) -> str:
    r"""A text on one line that is safe to show in a terminal, a page or a picture.

    White space becomes single spaces. Some characters are shown as Python writes them, such as ``\x1b``: control
    characters (escape sequences begin with one), lone surrogates, and marks that change the direction of the text.

    Args:
        text: any text.

    Example:
        >>> printable("two\nlines, \x1b[31mred")
        'two lines, \\x1b[31mred'
    """
    line = " ".join(text.split())
    if line.isascii() and line.isprintable():
        return line
    return "".join(map(_printable_character, line))


def printable_piece(text: str) -> str:
    r"""A piece of a text, such as a token, that is safe to show: as :func:`printable`, but spaces and lines stay.

    The end of a line is shown as Python writes it, and then begins a new one. Other white space becomes a space.

    Args:
        text: any text.

    Example:
        >>> printable_piece(" two\n\tlines")
        ' two\\n\n lines'
    """
    return "".join(
        "\\n\n" if character == "\n" else " " if character.isspace() else _printable_character(character)
        for character in text
    )


def shortened(text: str, width: int) -> str:
    """A printable text of at most ``width`` characters; ``...`` stands for what is left out.

    Args:
        text: any text.
        width: of the result, in characters; at least 3.

    Example:
        >>> shortened("proponents", 8)
        'propo...'
    """
    text = printable(text)
    return text if len(text) <= width else text[: width - 3] + "..."


def encodable(text: str) -> str:
    r"""A text that UTF-8 can encode: lone surrogates are shown as Python writes them, such as ``\ud800``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _printable_character(character: str) -> str:
    if character in _DIRECTION_MARKS or unicodedata.category(character) in _UNSAFE:
        return character.encode("unicode_escape").decode("ascii")
    return character


def counted(number: int, thing: str) -> str:
    """A number and what it counts, in singular or plural.

    Args:
        number: how many things there are.
        thing: the word in the singular. Its plural must end in ``s``.

    Example:
        >>> counted(1, "checkpoint"), counted(2, "checkpoint")
        ('1 checkpoint', '2 checkpoints')
    """
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
