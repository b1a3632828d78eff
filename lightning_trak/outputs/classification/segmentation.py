"""The margin of a map of labels: one for each pixel, point or token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.checks import integer
from lightning_trak.outputs.batches import LABELS_KEYS, Forward, LabelsKey
from lightning_trak.outputs.margins import binary_log_odds, log_odds, logistic_loss, pooled_margin
from lightning_trak.outputs.predictions import Predictions, SeveralPredictions

_OTHERWISE = "for other tasks write a ModelOutput of your own, or use NegativeLoss"


class SegmentationMargin(SeveralPredictions):
    r"""Log-odds of the labels of all pixels of an example, :math:`f = \log p - \log(1 - p)`.

    :math:`p_i` is the probability of the label of pixel i, and p is their geometric mean over the pixels that count. So
    the loss is the mean cross-entropy of a pixel, :math:`l = -\log p = -\mathrm{mean}_i \log p_i = \log(1 + e^{-f})`.
    Then Q = 1 - p and R = p(1 - p), as for :class:`~lightning_trak.outputs.ClassificationMargin`, which this
    is for one pixel.

    ``cross_entropy`` of a batch takes the mean over the pixels of all its images together. This is the mean over
    images, of the mean over their pixels, if all images have the same number of pixels that count.

    Batches are tuples ``(inputs, ..., labels)`` or mappings with labels, as for ``ClassificationMargin``. The module
    returns logits ``(batch, classes, *positions)`` for labels ``(batch, *positions)``, class indices; or, for labels
    0 and 1, ``(batch, 1, *positions)``. Positions are those of an image, a volume or a sequence. A label outside the
    classes has no margin, and neither has an example without any label that counts. The output is then NaN, so that
    featurizing stops and names the example.

    Args:
        ignore_index: a label that does not count, such as 255 on the borders of objects.
        forward: ``(module, batch) -> logits``, for modules that are called in another way or return something else.
        labels_key: where the labels are: a key or attribute, a position in a tuple, or a function of the batch; of
            several, the first that the batch has.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        forward: Forward | None = None,
        labels_key: LabelsKey = LABELS_KEYS,
    ) -> None:
        super().__init__(forward, labels_key)
        self.ignore_index = integer("ignore_index", ignore_index)

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The margin of each example's map of labels, shape ``(batch,)``.

        Raises:
            ValueError: if logits and labels have other shapes or types than the class describes.
        """
        return pooled_margin(*self._margins(module, batch))

    def predictions(self, module: nn.Module, batch: Any) -> Predictions:
        """See :meth:`SeveralPredictions.predictions <lightning_trak.outputs.predictions.SeveralPredictions>`."""
        return Predictions.of(*self._margins(module, batch), exponent=1)

    def _margins(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The margin of each pixel, and whether it counts: ``(batch, pixels)``."""
        logits, labels = self._maps(module, batch)
        counted = labels != self.ignore_index
        if logits.shape[1] == 1:
            margins = binary_log_odds(logits.squeeze(1), labels, counted)
        else:
            margins = log_odds(logits.movedim(1, -1), torch.where(counted, labels, 0))
        return margins.flatten(1), counted.flatten(1)

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says that no label counts, or which one is outside the classes, if so."""
        logits, labels = self._maps(module, batch)
        classes = max(2, logits.shape[1])
        counted = labels[labels != self.ignore_index]
        if not len(counted):
            return f"all of its labels are {self.ignore_index}, which does not count; leave it out of the dataset"
        outside = counted[(counted < 0) | (counted >= classes)]
        if not len(outside):
            return None
        return (
            f"one of its labels is {outside[0].item()}, and the model has {classes} classes, 0 to {classes - 1}; name"
            " the label that does not count by ignore_index="
        )

    def loss(self, output: Tensor) -> Tensor:
        """The mean cross-entropy of a pixel at each margin, shape ``(batch,)``."""
        return logistic_loss(output)

    def _maps(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits, labels = self.predict(module, batch)
        if labels.ndim < 2 or logits.ndim != labels.ndim + 1 or logits[:, 0].shape != labels.shape:
            raise ValueError(
                "expected logits of shape (batch, classes, *positions) for labels of shape (batch, *positions),"
                f" received {tuple(logits.shape)} and {tuple(labels.shape)}; pass forward= to reorder or select them"
            )
        if labels.is_floating_point():
            raise ValueError(f"expected labels as integer class indices, received {labels.dtype}; {_OTHERWISE}")
        return logits, labels.long()  # in uint8, -100 would be 156
