"""What outputs of language models share: one number for each token, and from these one for each text."""

from __future__ import annotations

import copy
import operator
from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_trak.checks import is_integer, require_one_of
from lightning_trak.outputs.batches import LABELS_KEYS, Forward, LabelsKey, predict
from lightning_trak.outputs.margins import log_odds, nan_unless
from lightning_trak.outputs.predictions import Predictions, SeveralPredictions
from lightning_trak.running.data.annotated import AnnotatedBatch

IGNORED = -100  # the label that torch.nn.CrossEntropyLoss and Hugging Face leave out
Reduction = Literal["mean", "sum", "sqrt"]
_EXPONENTS = {"mean": 1.0, "sum": 0.0, "sqrt": 0.5}


class Tokens(NamedTuple):
    """The labels of a batch of texts.

    Attributes:
        inputs: what the module takes.
        labels: int64, shape ``(batch, length)``.
        counted: which of them count, bool of the same shape.
        positions: of the tokens in their texts, padding left out where the batch has an attention mask for the labels;
            int64 of the same shape.
    """

    inputs: Any
    labels: Tensor
    counted: Tensor
    positions: Tensor


class TokenOutput(SeveralPredictions):
    r"""Base of the outputs of texts that are sums over tokens: :math:`f = T^{-a} \sum_t f_t`.

    T is the number of tokens that count: a = 1 is the mean, a = 0 the sum, and a = 1/2 divides by the square root.

    Args:
        pad_token_id: a label to leave out.
        forward: ``(module, batch) -> logits``, for modules that are called in another way.
        labels_key: where the labels are: a key, a position in a tuple, or a function of the batch; of several, the
            first that the batch has.
        reduction: ``"mean"``, ``"sum"`` or ``"sqrt"``: a.
        per_token: whether it is the output of single tokens f_t. It is then for targets alone: methods make a row for
            each token of a text that counts.
    """

    def __init__(
        self,
        pad_token_id: int | None = None,
        forward: Forward | None = None,
        labels_key: LabelsKey = LABELS_KEYS,
        reduction: Reduction = "mean",
        per_token: bool = False,
    ) -> None:
        super().__init__(forward, labels_key)
        require_one_of("reduction", reduction, tuple(_EXPONENTS))
        if pad_token_id is not None and not is_integer(pad_token_id):
            raise TypeError(
                "pad_token_id must be the id of one token, such as tokenizer.pad_token_id, or None; got"
                f" {pad_token_id!r}"
            )
        self.pad_token_id = None if pad_token_id is None else operator.index(pad_token_id)
        self.reduction: Reduction = reduction
        self.per_token = per_token

    @property
    def for_targets(self) -> bool:  # type: ignore[override]
        """Whether it is the output of single tokens."""
        return self.per_token

    def of_tokens(self) -> Self:
        """The same output of single tokens."""
        other = copy.copy(self)
        other.per_token = True
        return other

    def weight(self, count: Tensor) -> Tensor:
        """What a token weighs in its text: T^-a, or NaN where no token counts.

        Args:
            count: T, the number of tokens that count, in floats of any shape.
        """
        return count.pow(-_EXPONENTS[self.reduction]) * nan_unless(count > 0)

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The output of each text, or with ``per_token`` of one of its tokens; shape ``(batch,)``.

        Raises:
            ValueError: if batch, logits, labels or attention mask are not as the class describes.
        """
        logits, labels, counted = self._asked(module, batch)
        values = self._values(logits, labels, counted)
        count = counted.sum(-1, keepdim=True)
        weight = self.weight(count.to(values.dtype))
        # Selected, not only weighted by zero: a token that does not count may have an infinite value.
        return (torch.where(counted | (count == 0), values, 0.0) * weight).sum(-1)

    def predictions(self, module: nn.Module, batch: Any) -> Predictions:
        """See :meth:`SeveralPredictions.predictions <lightning_trak.outputs.predictions.SeveralPredictions>`."""
        logits, labels, counted = self.aligned(module, batch)
        margins = log_odds(logits, torch.where(counted, labels, 0))
        return Predictions.of(margins, counted, _EXPONENTS[self.reduction])

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says that no token counts, or which label is outside the vocabulary, if so."""
        logits, labels, counted = self.aligned(module, batch.batch if isinstance(batch, AnnotatedBatch) else batch)
        vocabulary, labels = logits.shape[-1], labels[counted]
        if not len(labels):
            skipped = "-100" if self.pad_token_id is None else f"-100 or pad_token_id={self.pad_token_id}"
            return (
                f"none of its tokens counts, as all are masked, labelled {skipped}, or first in the text; leave it out"
                " of the dataset"
            )
        outside = labels[(labels < 0) | (labels >= vocabulary)].tolist()
        if outside:
            most = vocabulary - 1
            return f"one of its labels is {outside[0]}, and the vocabulary has {vocabulary} tokens, 0 to {most}"
        if isinstance(batch, AnnotatedBatch):
            return (
                f"it is a row for one of {int(batch.notes[0, 1])} tokens; if its text has another number of tokens in a"
                " batch with others, or after on_after_batch_transfer, give it the same tokens everywhere"
            )
        return None

    @abstractmethod
    def tokens(self, batch: Any) -> Tokens:
        """The labels of a batch, as the dataloader gives it, and which of them count.

        Raises:
            ValueError: if batch, labels or attention mask are not as the class describes.
        """

    def aligned(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the label of each, and whether it counts: ``(batch, length[, vocabulary])``."""
        inputs, labels, counted, _ = self.tokens(batch)
        logits = predict(module, batch, inputs, self.forward)
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"expected logits of shape ({labels.shape[0]}, {labels.shape[1]}, vocabulary), for labels of shape"
                f" {tuple(labels.shape)}, received {tuple(logits.shape)}; pass forward= if the module returns others"
            )
        return logits, labels, counted

    @abstractmethod
    def _values(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """f_t of the tokens that count, anything elsewhere; shape ``(batch, length)``."""

    def _asked(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`aligned`; with ``per_token``, only the token that a row is for counts."""
        if not self.per_token:
            return self.aligned(module, batch)
        if not isinstance(batch, AnnotatedBatch):
            raise ValueError(
                f"{type(self).__name__}(per_token=True) needs a row for each token, but received a"
                f" {type(batch).__name__}: give it as output= to score of a method over features, or to attribute of"
                " influence functions or Metagradient, which make the rows"
            )
        logits, labels, counted = self.aligned(module, batch.batch)
        token, total = torch.split(batch.notes, 1, dim=1)  # which of the tokens that count, and how many count
        place, known = counted.cumsum(-1) - 1 == token, counted.sum(-1, keepdim=True) == total
        return logits, labels, counted & place & known

    def _counted(self, labels: Tensor) -> Tensor:
        counted = labels != IGNORED
        return counted if self.pad_token_id is None else counted & (labels != self.pad_token_id)


def token_ids(labels: Tensor) -> Tensor:
    """Labels as int64: in uint8, -100 would be 156.

    Raises:
        ValueError: if they are not token ids of shape ``(batch, length)``.
    """
    if labels.ndim != 2 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"expected labels as token ids of shape (batch, length), received {labels.dtype} of shape"
            f" {tuple(labels.shape)}"
        )
    return labels.long()
