"""The margin of a classifier's label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.outputs.batches import one_per_example
from lightning_trak.outputs.labelled import LabelledOutput
from lightning_trak.outputs.margins import log_odds, logistic_loss, nan_unless

_OTHERWISE = "for other tasks write a ModelOutput of your own, or use NegativeLoss"


class ClassificationMargin(LabelledOutput):
    r"""Log-odds of the label, :math:`f = \log p_y - \log(1 - p_y)`.

    The loss is the cross-entropy, :math:`l = -\log p_y = \log(1 + e^{-f})`; hence Q = 1 - p and R = p(1 - p) (Park et
    al. 2023, arXiv 2303.14186, section 3.3, which reduces several classes to the logistic regression of "label against
    the rest").

    Batches are tuples ``(inputs, ..., labels)``, for ``module(inputs, ...)``, or mappings with labels, whose other
    items are the module's keywords. The module returns logits, as a tensor, in ``.logits``, under ``"logits"`` or first
    of a tuple: ``(batch, classes)`` with class indices as labels, or ``(batch,)`` or ``(batch, 1)`` with labels 0, 1.

    A label outside the classes, such as an ignored index, has no margin: the output is NaN, so that featurizing stops
    and names the example and its label. Leave such examples out of the dataset.

    Args:
        forward: ``(module, batch) -> logits``, for modules that are called in another way.
        labels_key: where the labels are: a key or attribute, a position in a tuple, or a function of the batch; of
            several, the first that the batch has.
    """

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The margin of each example's label, shape ``(batch,)``.

        Raises:
            ValueError: if logits and labels have other shapes or types than the class describes.
        """
        logits, labels = self.predict(module, batch)
        labels = one_per_example("labels", labels, _OTHERWISE)
        if logits.ndim not in (1, 2) or logits.shape[0] != labels.shape[0]:
            raise ValueError(
                f"expected logits of shape (batch, classes), (batch, 1) or (batch,) for {labels.shape[0]} labels,"
                f" received {tuple(logits.shape)}; {_OTHERWISE}"
            )
        if logits.ndim == 1 or logits.shape[1] == 1:
            return _binary_margin(logits.reshape(-1), labels)
        if labels.is_floating_point():
            raise ValueError(
                f"expected labels as integer class indices for {logits.shape[1]} classes, received {labels.dtype};"
                f" {_OTHERWISE}"
            )
        return log_odds(logits, labels)

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says that the label is outside the classes, if so."""
        logits, labels = self.predict(module, batch)
        classes = logits.shape[1] if logits.ndim == 2 and logits.shape[1] > 1 else 2
        label = labels.flatten()[0].item()
        if label in range(classes):
            return None
        return (
            f"its label is {label}, and the model has {classes} classes, 0 {'to' if classes > 2 else 'and'}"
            f" {classes - 1}; leave such examples out of the dataset"
        )

    def loss(self, output: Tensor) -> Tensor:
        """The cross-entropy at each margin, shape ``(batch,)``."""
        return logistic_loss(output)


def _binary_margin(logits: Tensor, labels: Tensor) -> Tensor:
    sign = torch.where(labels == 1, 1.0, -1.0) * nan_unless((labels == 0) | (labels == 1))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) * sign
