"""Texts whose tokens have scores, for pages and terminals that colour them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lightning_trak.texts.printable import counted

Decode = Callable[[list[int]], str]

NO_TEXT = "\u00b7"  # is shown for a token without a text of its own
_UNFINISHED = "\ufffd"  # what decoders put for a part of a character


class ScoredText(NamedTuple):
    """A text whose tokens have scores.

    Attributes:
        title: says which text it is, and what the scores are.
        tokens: the text of each token; together they are the whole text.
        scores: of each token; None for those without, such as a prompt.
    """

    title: str
    tokens: list[str]
    scores: list[float | None]


def scored_text(title: str, ids: Any, positions: Any, scores: Any, decode: Decode) -> ScoredText:
    """A text whose tokens have scores.

    Args:
        title: says which text it is, and what the scores are.
        ids: all tokens of the text, without padding, shape ``(length,)``.
        positions: of the tokens with scores, as in :class:`~lightning_trak.methods.tokens.TextTokens` or
            :class:`~lightning_trak.methods.token_scores.TokenScores`.
        scores: of these tokens.
        decode: makes a text of several token ids, such as ``tokenizer.decode``.

    Raises:
        ValueError: if there are not as many scores as positions, a position is outside of the text, or a score is not
            finite.

    Example:
        >>> def decode(ids):
        ...     return "".join("abc"[i] for i in ids)
        >>> scored_text("a target", [0, 1, 2], [2], [0.5], decode)
        ScoredText(title='a target', tokens=['a', 'b', 'c'], scores=[None, None, 0.5])
    """
    ids, positions, values = (torch.as_tensor(part).tolist() for part in (ids, positions, scores))
    if len(positions) != len(values):
        raise ValueError(f"expected a score for each position, got {len(values)} for {len(positions)} positions")
    found: list[float | None] = [None] * len(ids)
    for position, value in zip(positions, values, strict=True):
        if not 0 <= position < len(ids):
            raise ValueError(
                f"token {position} has a score, but the text has {counted(len(ids), 'token')}: give the ids of the text"
                " that was scored, without padding"
            )
        if not math.isfinite(value):
            raise ValueError(f"the score of token {position} is {value}; score again")
        found[position] = value
    return ScoredText(title, _pieces(ids, decode), found)


def largest_score(texts: Sequence[ScoredText]) -> float:
    """The size of the largest score, by which colours are chosen; 0 if there is none.

    Raises:
        ValueError: if a text has not one score for each token, or a score is not finite.
    """
    sizes = [0.0]
    for text in texts:
        if len(text.tokens) != len(text.scores):
            raise ValueError(f'"{text.title}" has {len(text.scores)} scores for {counted(len(text.tokens), "token")}')
        sizes += [abs(score) for score in text.scores if score is not None]
    if not all(map(math.isfinite, sizes)):
        raise ValueError("some scores are NaN or infinite; score again")
    return max(sizes)


def _pieces(ids: list[int], decode: Decode) -> list[str]:
    """What each token adds to the text of those before it.

    Tokens alone may have other texts, without the space before a word, or with a part of a character. A token that does
    not finish a character has no text; the one that does has the whole character.
    """
    pieces, before = [], ""
    for stop in range(1, len(ids) + 1):
        text = decode(ids[:stop])
        if text.endswith(_UNFINISHED) and stop < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces
