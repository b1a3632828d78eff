"""Texts as targets token by token: a row for each token, and which row is which token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.language.tokens import TokenOutput
from lightning_trak.running.data.annotated import annotated
from lightning_trak.running.data.loading import load, num_examples
from lightning_trak.running.data.sources import Data, as_loaders, single_loader
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.trainers import trainer_of


class TextTokens(NamedTuple):
    """Which token each row of scores is for. Rows are in the order of texts, and of tokens in a text.

    Attributes:
        texts: position of the text in its dataset, int64, shape ``(num_rows,)``. As ``groups=texts``, it joins the rows
            of a text.
        positions: position of the token in the text, from 0. Padding does not count where the batch has an attention
            mask.
        ids: the token.
    """

    texts: Tensor
    positions: Tensor
    ids: Tensor

    def of(self, text: int) -> slice:
        """The rows of a text.

        Raises:
            ValueError: if there are none.
        """
        rows = (self.texts == text).nonzero().flatten()
        if not len(rows):
            raise ValueError(f"there are no tokens of text {text}")
        return slice(int(rows[0]), int(rows[-1]) + 1)


def text_tokens(trainer: L.Trainer | None, data: Data, output: ModelOutput) -> TextTokens:
    """Which token each row of scores is for, when texts are scored token by token.

    Args:
        trainer: as for ``score``.
        data: the targets, as for ``score``.
        output: the output of tokens, as for ``score``, such as ``CausalLMMargin(per_token=True)``.

    Raises:
        TypeError: if the output has no tokens.
        ValueError: if it is not ``per_token``, or no token of a text counts.
    """
    output = require_tokens(output)
    if not output.per_token:
        raise ValueError(f"this {type(output).__name__} is the output of whole texts: make it with per_token=True")
    return find_tokens(single_loader(data, "predict", trainer_of(trainer)), output)


def require_tokens(output: ModelOutput) -> TokenOutput:
    """The output, if it is one of tokens.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(output, TokenOutput):
        raise TypeError(
            f"{type(output).__name__} is not known to be a sum over tokens: tokens need CausalLMMargin,"
            " CausalLMLogLikelihood or Seq2SeqLMMargin"
        )
    return output


def target_loaders(
    data: Data | Sequence[DataLoader[Any]] | None, trainer: L.Trainer, output: ModelOutput | None
) -> list[DataLoader[Any]]:
    """The loaders of targets, see :func:`target_loader`.

    Args:
        data: the targets, as for ``score``.
        trainer: the Trainer that a data module is attached to.
        output: the output of the targets; None: that of the training examples.
    """
    return [target_loader(loader, output) for loader in as_loaders(data, "predict", trainer)]


def target_loader(loader: DataLoader[Any], output: ModelOutput | None) -> DataLoader[Any]:
    """The loader of targets: a row for each token if that is what the output is of, else the same loader.

    Raises:
        ValueError: if no token of a text counts.
    """
    if not isinstance(output, TokenOutput) or not output.per_token:
        return loader
    return token_loader(loader, find_tokens(loader, output))


def find_tokens(loader: DataLoader[Any], output: TokenOutput, texts: Sequence[int] | None = None) -> TextTokens:
    """The tokens that count, from batches that hold one text each, so that no other text pads it.

    Args:
        loader: of the texts.
        output: says which tokens count.
        texts: positions of texts in the loader's dataset; default: all.

    Raises:
        ValueError: if no token of a text counts.
    """
    texts = range(num_examples(loader)) if texts is None else texts
    columns: list[tuple[Tensor, ...]] = []
    with isolated_random_states():
        # Twice, because a collate function may need more than one example.
        for text, batch in zip(texts, load(loader, ([text, text] for text in texts)), strict=True):
            _, labels, counted, positions = (
                part[0] if isinstance(part, Tensor) else part for part in output.tokens(batch)
            )
            rows = counted.nonzero().flatten()
            if not len(rows):
                raise ValueError(
                    f"no token of text {text} counts, as all are masked or labelled -100; leave it out of the dataset"
                )
            columns.append((torch.full_like(rows, text), positions[rows], labels[rows]))
    return TextTokens(*map(torch.cat, zip(*columns, strict=True)))


def token_loader(loader: DataLoader[Any], tokens: TextTokens) -> DataLoader[Any]:
    """A loader with a row for each token, in batches of the given loader's size.

    Its notes are the number of the token among those of its text that count, and how many count.

    Args:
        loader: of the texts.
        tokens: the tokens, all of each text, which follow each other.
    """
    _, totals = torch.unique_consecutive(tokens.texts, return_counts=True)
    numbers = torch.cat([torch.arange(int(total)) for total in totals])
    return annotated(loader, torch.stack([numbers, totals.repeat_interleave(totals)], dim=1), tokens.texts)
