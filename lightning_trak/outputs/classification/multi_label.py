"""The margin of a set of labels, each of which an example has or has not."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from lightning_trak.checks import integer, require_one_of
from lightning_trak.outputs.batches import LABELS_KEYS, Forward, LabelsKey
from lightning_trak.outputs.classification.suspicions import ends_in_sigmoid, takes_for_logits
from lightning_trak.outputs.margins import binary_log_odds, logistic_loss, pooled_margin
from lightning_trak.outputs.predictions import Predictions, SeveralPredictions

_OTHERWISE = "for one label of several use ClassificationMargin, for other losses NegativeLoss"


class MultiLabelMargin(SeveralPredictions):
    r"""Log-odds of all labels of an example together, :math:`f = \log p - \log(1 - p)`.

    :math:`p_c` is the probability that the model gives to what is known of label c, and p is their geometric mean. So
    the loss is the mean binary cross-entropy, :math:`l = -\log p = -\mathrm{mean}_c \log p_c = \log(1 + e^{-f})`, as
    ``binary_cross_entropy_with_logits`` takes it. With ``reduction="sum"`` p is their product, the probability of the
    whole set of labels, and the loss is the sum. Then Q = 1 - p and R = p(1 - p), as for
    :class:`~lightning_trak.outputs.ClassificationMargin`, which this is for one label.

    Batches are tuples ``(inputs, ..., labels)`` or mappings with labels, as for ``ClassificationMargin``. The module
    returns logits ``(batch, labels)``. Labels are of this shape: 1 where the example has the label, else 0. Other
    values than these and ``ignore_index`` have no margin, and neither has an example without any label that counts. The
    output is then NaN, so that featurizing stops and names the example.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the labels, as in the training loss.
        ignore_index: the value of a label that is not known. It does not count.
        forward: ``(module, batch) -> logits``, for modules that are called in another way.
        labels_key: where the labels are: a key or attribute, a position in a tuple, or a function of the batch; of
            several, the first that the batch has.
    """

    def __init__(
        self,
        reduction: Literal["mean", "sum"] = "mean",
        ignore_index: int = -100,
        forward: Forward | None = None,
        labels_key: LabelsKey = LABELS_KEYS,
    ) -> None:
        super().__init__(forward, labels_key)
        require_one_of("reduction", reduction, ("mean", "sum"))
        ignore_index = integer("ignore_index", ignore_index)
        if ignore_index in (0, 1):
            raise ValueError(f"expected ignore_index other than 0 and 1, which are labels, received {ignore_index}")
        self.reduction = reduction
        self.ignore_index = ignore_index

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The margin of each example's labels, shape ``(batch,)``.

        Raises:
            ValueError: if logits and labels are not both of one shape ``(batch, labels)``.
        """
        margins, counted = self._margins(module, batch)
        return pooled_margin(margins, counted, self.reduction == "mean")

    def predictions(self, module: nn.Module, batch: Any) -> Predictions:
        """See :meth:`SeveralPredictions.predictions <lightning_trak.outputs.predictions.SeveralPredictions>`."""
        return Predictions.of(*self._margins(module, batch), exponent=1 if self.reduction == "mean" else 0)

    def _margins(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The margin of what is known of each label, and whether it counts: ``(batch, labels)``."""
        logits, labels = self._labelled(module, batch)
        if logits.ndim != 2 or logits.shape != labels.shape:
            raise ValueError(
                f"expected logits and labels of one shape (batch, labels), received {tuple(logits.shape)} and"
                f" {tuple(labels.shape)}; {_OTHERWISE}"
            )
        counted = labels != self.ignore_index
        return binary_log_odds(logits, labels, counted), counted

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says that no label counts, or which one is neither 0 nor 1, if so."""
        labels = self._labelled(module, batch)[1][0]
        counted = labels[labels != self.ignore_index]
        if not len(counted):
            return f"all of its labels are {self.ignore_index}, which does not count; leave it out of the dataset"
        wrong = counted[(counted != 0) & (counted != 1)]
        if not len(wrong):
            return None
        return f"one of its labels is {wrong[0].item()}; expected 1, 0, or {self.ignore_index} where it is not known"

    def suspicion(self, module: nn.Module, batch: Any) -> str | None:
        """Says that the module returns probabilities of the labels in place of logits, if so."""
        logits, _ = self._labelled(module, batch)
        return takes_for_logits(module, self, "the log-odds (torch.logit)") if ends_in_sigmoid(logits) else None

    def loss(self, output: Tensor) -> Tensor:
        """The binary cross-entropy, reduced over the labels, at each margin; shape ``(batch,)``."""
        return logistic_loss(output)

    def _labelled(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits, labels = self.predict(module, batch)
        return logits, labels if labels.is_floating_point() else labels.long()  # in uint8, -100 would be 156
