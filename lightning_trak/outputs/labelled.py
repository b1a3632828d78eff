"""What outputs of labelled examples share: where the labels are, and how the module is called on the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_trak.outputs.base import ModelOutput
from lightning_trak.outputs.batches import LABELS_KEYS, Forward, LabelsKey, as_keys, predict, split_labels


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
