"""What outputs of labelled examples share: where the labels are, and how the module is called on the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.outputs.base import ModelOutput
from lightning_trak.outputs.batches import (
    LABELS_KEYS,
    Forward,
    LabelsKey,
    as_keys,
    has_labels,
    one_per_example,
    predict,
    split_labels,
)


class LabelledOutput(ModelOutput):
    """Base of the outputs whose batches hold labels.

    Args:
        forward: ``(module, batch) -> predictions``, for modules that are called in another way than on the rest of the
            batch.
        labels_key: where the labels are: a key or attribute, a position in a tuple, or a function of the batch; of
            several, the first that the batch has.
    """

    def __init__(self, forward: Forward | None = None, labels_key: LabelsKey = LABELS_KEYS) -> None:
        self.forward = forward
        self.labels_key = as_keys(labels_key)

    def predict(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The module's predictions for a batch, and the labels."""
        inputs, labels = split_labels(batch, self.labels_key)
        return predict(module, batch, inputs, self.forward), labels

    def truth(self, batch: Any) -> Tensor | None:
        """The labels of a batch, one for each example; None if it has none."""
        if not has_labels(batch, self.labels_key):
            return None
        _, labels = split_labels(batch, self.labels_key)
        return one_per_example("labels", labels, "there is one label for each prediction")


def beside_truth(labels: Tensor | None, predictions: Tensor) -> Tensor:
    """Predictions with two columns in front: 1 if there are labels, and the labels; zeros if there are none.

    Args:
        labels: shape ``(batch,)``.
        predictions: shape ``(batch, n)``.

    Returns:
        Shape ``(batch, 2 + n)``, in float32 or better.
    """
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    truth = predictions.new_zeros(len(predictions), 2)
    if labels is not None:
        truth[:, 0], truth[:, 1] = 1, labels.to(truth.dtype)
    return torch.cat([truth, predictions], dim=1)
