"""What outputs share whose loss adds up several predictions for an example, such as its tokens, pixels or labels."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_trak.outputs.labelled import LabelledOutput
from lightning_trak.outputs.margins import nan_unless


class Predictions(NamedTuple):
    """The predictions for the examples of a batch.

    Attributes:
        margins: log p - log(1 - p) of each label, shape ``(batch, predictions)``; 0 where a prediction does not count.
        weights: what the loss -log p of each is multiplied by, of the same shape: 0 where it does not count, and NaN
            for an example in which none counts.
    """

    margins: Tensor
    weights: Tensor

    @classmethod
    def of(cls, margins: Tensor, counted: Tensor, exponent: float) -> Predictions:
        """Those of T predictions that count weigh T^-exponent each: 1 for a mean of their losses, 0 for a sum.

        Args:
            margins: shape ``(batch, predictions)``; anything where a prediction does not count.
            counted: which of them count, bool of the same shape.
            exponent: of T.
        """
        count = counted.sum(-1, keepdim=True)
        weights = count.to(margins.dtype).pow(-exponent) * nan_unless(count > 0) * counted
        # Selected, not only weighted by zero: a prediction that does not count may have an infinite margin.
        return cls(torch.where(counted, margins, 0.0), weights)


class SeveralPredictions(LabelledOutput):
    """Base of the outputs for training on a weighted sum of the cross-entropies of several predictions.

    :meth:`loss` may be another one: that of a single prediction that stands for them, such as a text's mean margin.
    """

    averages = True

    @abstractmethod
    def predictions(self, module: nn.Module, batch: Any) -> Predictions:
        """The margins of the single predictions, differentiable in the module's parameters, and their weights.

        Args:
            module: the model, in eval mode.
            batch: a batch as the dataloader gives it.
        """
