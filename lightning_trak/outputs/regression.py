"""The residual of a scalar regression."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.outputs.batches import one_per_example, predict, without_labels
from lightning_trak.outputs.labelled import LabelledOutput, beside_truth


class RegressionOutput(LabelledOutput):
    r"""Signed residual :math:`f` = prediction - target, with the squared error :math:`l = f^2/2`: Q = -f and R = 1.

    The target is a constant, so gradients are those of the prediction, and the effects on f are effects on the
    prediction; unlike the prediction itself, f alone determines the loss.

    Batches are tuples ``(inputs, ..., targets)`` or mappings with targets, as for
    :class:`~lightning_trak.outputs.ClassificationMargin`; the module returns one prediction per example,
    ``(batch,)`` or ``(batch, 1)``, as a tensor, as ``logits`` of an object or mapping, or first of a tuple.

    Args:
        forward: ``(module, batch) -> predictions``, for modules that are called in another way.
        labels_key: where the targets are: a key or attribute, a position in a tuple, or a function of the batch; of
            several, the first that the batch has.
    """

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The residual of each example, shape ``(batch,)``.

        Raises:
            ValueError: if predictions or targets are not one number per example, or differ in number.
        """
        predictions, targets = self.predict(module, batch)
        advice = "for several targets per example use NegativeLoss"
        predictions = one_per_example("predictions", predictions, advice)
        targets = one_per_example("targets", targets, advice)
        if predictions.shape != targets.shape:
            raise ValueError(
                f"expected one target per prediction, received {predictions.shape[0]} predictions and"
                f" {targets.shape[0]} targets"
            )
        dtype = torch.promote_types(predictions.dtype, torch.float32)
        return predictions.to(dtype) - targets.to(dtype)

    def prediction(self, module: nn.Module, batch: Any) -> Tensor:
        """Whether there is a target, the target, and the prediction; shape ``(batch, 3)``."""
        inputs = without_labels(batch, self.labels_key)
        found = one_per_example("predictions", predict(module, batch, inputs, self.forward), "expected one number each")
        return beside_truth(self.truth(batch), found.unsqueeze(1))

    def describe_prediction(self, prediction: Tensor) -> str:
        """The prediction and the target."""
        known, target, predicted = prediction.tolist()
        return f"predicted {predicted:.4g}" + (f", the truth is {target:.4g}" if known else "")

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says that the target is not finite, if so."""
        target = float(self.predict(module, batch)[1].flatten()[0])
        return None if math.isfinite(target) else f"its target is {target}; leave such examples out of the dataset"

    def loss(self, output: Tensor) -> Tensor:
        """Half the squared residual, shape ``(batch,)``."""
        return output.square() / 2
