"""Texts that come with the user's data, made harmless where people read them, and plural words."""

import unicodedata

# Marks that turn the direction of the text around them (Unicode's bidirectional algorithm, UAX 9).
_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSAFE = frozenset(("Cc", "Cs"))  # control characters, and halves of a pair, which no file can hold


def printable(text: str) -> str:
    r"""A text on one line, without what a terminal would obey or a reader could not see through.

    White space becomes single spaces. Control characters, as in escape sequences, lone surrogates and marks that change
    the direction of writing are shown as Python writes them, such as ``\x1b``.

    Example:
        >>> printable("two\nlines, \x1b[31mred")
        'two lines, \\x1b[31mred'
    """
    line = " ".join(text.split())
    if line.isascii() and line.isprintable():
        return line
    return "".join(map(_shown, line))


def _shown(character: str) -> str:
    if character in _DIRECTION_MARKS or unicodedata.category(character) in _UNSAFE:
        return character.encode("unicode_escape").decode("ascii")
    return character


def counted(number: int, thing: str) -> str:
    """A number and what it counts, in singular or plural.

    Example:
        >>> counted(1, "checkpoint"), counted(2, "checkpoint")
        ('1 checkpoint', '2 checkpoints')
    """
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
