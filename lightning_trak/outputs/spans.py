"""A part of a text as the target: which tokens count."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_trak.outputs.language.tokens import IGNORED, token_ids

Positions = range | slice | Sequence[int] | Tensor


def span_labels(input_ids: Tensor | Sequence[int], positions: Positions) -> Tensor:
    """The labels of a text of which some tokens count: these tokens, and -100 elsewhere.

    As ``labels`` of an example, they make the output of :class:`~lightning_trak.outputs.CausalLMMargin` and
    :class:`~lightning_trak.outputs.CausalLMLogLikelihood` that of these tokens, given all tokens before each.

    Args:
        input_ids: the text as token ids, shape ``(length,)``.
        positions: of the tokens that count, from 0: a range, a slice, integers, or a mask, ``(length,)`` bools. The
            first token of a text is never predicted, so that it does not count.

    Returns:
        int64, shape ``(length,)``.

    Raises:
        ValueError: if the ids are no text, a position is outside of it, a mask has another length, or no token is left
            that is predicted.

    Example:
        >>> span_labels([5, 6, 7, 8], range(2, 4))
        tensor([-100, -100,    7,    8])
    """
    ids = token_ids(torch.as_tensor(input_ids).unsqueeze(0))[0]
    length = len(ids)
    chosen = list(range(length)[positions]) if isinstance(positions, slice) else _numbers(positions, length)
    wrong = next((position for position in chosen if not 0 <= position < length), None)
    if wrong is not None:
        raise ValueError(f"positions name token {wrong}, and the text has {length}, from 0 to {length - 1}")
    if not any(chosen):
        what = "the first token alone, which is never predicted" if chosen else "no token"
        raise ValueError(f"positions name {what}; name a token after the first")
    labels = torch.full_like(ids, IGNORED)
    labels[chosen] = ids[chosen]
    return labels


def _numbers(positions: Iterable[Any], length: int) -> list[int]:
    """The positions as integers. A mask has a bool for each token; taken for integers, bools would be 0 and 1."""
    given = list(positions)
    if any(np.asarray(each).dtype == bool for each in given):
        if len(given) != length:
            raise ValueError(f"a mask of positions needs a bool for each of {length} tokens, got {len(given)}")
        return [place for place, counts in enumerate(given) if counts]
    return [operator.index(position) for position in given]


def character_positions(offsets: Any, start: int, stop: int) -> list[int]:
    """The positions of the tokens that hold a character of a range.

    A token on the border counts as a whole.

    Args:
        offsets: for each token, the range of its characters in the text, as fast tokenizers of Hugging Face return them
            with ``return_offsets_mapping=True``; shape ``(length, 2)``. Special tokens have none.
        start: the first character.
        stop: the end, as in ``text[start:stop]``.

    Raises:
        ValueError: if the range is empty or no token is in it.

    Example:
        >>> character_positions([(0, 0), (0, 3), (3, 9), (9, 10)], 4, 10)
        [2, 3]
    """
    if not 0 <= start < stop:
        raise ValueError(f"expected a range of characters from 0 on, got {start} to {stop}")
    ranges = torch.as_tensor(offsets)
    if not len(ranges) or ranges.shape[1:] != (2,):
        raise ValueError(
            f"expected offsets of one text, of shape (length, 2), got {tuple(ranges.shape)}; a batch of texts is cut"
            " with offsets[0], offsets[1] and so on"
        )
    spans = ranges.tolist()
    found = [place for place, (first, last) in enumerate(spans) if first < last and first < stop and last > start]
    if not found:
        raise ValueError(f"no token has a character from {start} to {stop}; the last ends at {max(map(max, spans))}")
    return found


def span_target(tokenizer: Callable[..., Mapping[str, Any]], text: str, start: int, stop: int) -> dict[str, Tensor]:
    """A target of which the tokens of some characters count, such as those of an answer without its prompt.

    Args:
        tokenizer: a fast tokenizer of Hugging Face. It is called on the text.
        text: the whole text. Its beginning is what the tokens are predicted from.
        start: the first character that counts.
        stop: the end, as in ``text[start:stop]``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, shape ``(length,)`` each, for a dataset of targets.

    Raises:
        ValueError: if the range is not in the text, or no token of it is predicted.

    Example::

        prompt, answer = "Where was Ada born?", " In London."
        text = prompt + answer
        target = span_target(tokenizer, text, len(prompt), len(text))
    """
    if not 0 <= start < stop <= len(text):
        raise ValueError(f"expected a range of characters from 0 to {len(text)}, got {start} to {stop}")
    found = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor(found["input_ids"])
    labels = span_labels(ids, character_positions(found["offset_mapping"], start, stop))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
