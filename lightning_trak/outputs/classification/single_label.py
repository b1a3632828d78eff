"""The margin of a classifier's label."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.checks import is_integer
from lightning_trak.outputs.batches import LABELS_KEYS, Forward, LabelsKey, one_per_example, predict, without_labels
from lightning_trak.outputs.classification.suspicions import ends_in_sigmoid, sums_to_one, takes_for_logits
from lightning_trak.outputs.labelled import LabelledOutput, beside_truth
from lightning_trak.outputs.margins import binary_log_odds, log_odds, logistic_loss, nan_unless
from lightning_trak.running.data.annotated import AnnotatedBatch

PREDICTED = "predicted"
_OTHERWISE = (
    "labels.argmax(1) makes indices of one-hot labels; for several labels of an example take MultiLabelMargin, for"
    " numbers RegressionOutput, for any other loss NegativeLoss"
)


class ClassificationMargin(LabelledOutput):
    r"""Log-odds of the label, :math:`f = \log p_y - \log(1 - p_y)`.

    The loss is the cross-entropy, :math:`l = -\log p_y = \log(1 + e^{-f})`; hence Q = 1 - p and R = p(1 - p) (Park et
    al. 2023, arXiv 2303.14186, section 3.3, which reduces several classes to the logistic regression of "label against
    the rest").

    Batches are tuples ``(inputs, ..., labels)``, for ``module(inputs, ...)``, or mappings with labels, whose other
    items are the module's keywords. The module returns logits, as a tensor, in ``.logits``, under ``"logits"`` or first
    of a tuple: ``(batch, classes)`` with class indices as labels, or ``(batch,)`` or ``(batch, 1)`` with labels 0, 1.
    If it returns probabilities, pass a ``forward`` that returns their logarithms (of one probability, the log-odds).

    A label outside the classes, such as an ignored index, has no margin: the output is NaN, so that featurizing stops
    and names the example and its label. Leave such examples out of the dataset.

    With ``labels`` or ``against`` it is an output of targets alone, for ``score(..., output=)``: training acted on the
    labels of the data. ``labels="predicted"`` asks why the model predicted this, and ``labels=3, against=8`` why 3
    rather than 8, where :math:`f = \log p_3 - \log p_8`, the difference of the two logits. Then batches need no labels:
    they may be a tensor, a tuple of one, or a mapping without them, too.

    Args:
        forward: ``(module, batch) -> logits``, for modules that are called in another way.
        labels_key: where the labels are: a key or attribute, a position in a tuple, or a function of the batch; of
            several, the first that the batch has. None, with ``labels``: the batches have none.
        labels: in place of the batch's labels: ``"predicted"``, the class that the model predicts (of several
            checkpoints in a directory, the last one; of several directories or files, the class with the highest mean
            probability: all explain the same class); or a class, the same for all targets, as index or name.
        against: the class that the label is compared with, as index or name; default: all others together.
        classes: the names of all classes, in the order of the logits, if classes are given by name.
    """

    def __init__(
        self,
        forward: Forward | None = None,
        labels_key: LabelsKey | None = LABELS_KEYS,
        *,
        labels: int | str | None = None,
        against: int | str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if labels_key is None and labels is None:
            raise ValueError('labels_key=None needs labels=, such as labels="predicted": it says what the labels are')
        super().__init__(forward, () if labels_key is None else labels_key)
        self.classes = None if classes is None else tuple(classes)
        self.labels = labels if labels == PREDICTED else self._index("labels", labels)
        self.against = self._index("against", against)
        if self.against is not None and self.labels == self.against:
            raise ValueError(f"labels and against are the same class, {against!r}: there is nothing to compare")

    @property
    def for_targets(self) -> bool:  # type: ignore[override]
        """Whether the labels are others than those of training."""
        return self.labels is not None or self.against is not None

    @property
    def predicts_labels(self) -> bool:  # type: ignore[override]
        """Whether the labels are what the model predicts."""
        return self.labels == PREDICTED

    def _index(self, name: str, given: int | str | None) -> int | None:
        """The index of a class."""
        if given is None:
            return None
        if isinstance(given, str):
            if self.classes is None:
                raise ValueError(f"{name}={given!r} is a name: give the names of all classes by classes=, or an index")
            if self.classes.count(given) != 1:
                raise ValueError(f"{name}={given!r} is not one of the classes {list(self.classes)!r:.200}")
            return self.classes.index(given)
        if not is_integer(given):
            raise TypeError(f"expected {name} as the index or the name of a class, got {given!r}")
        index = operator.index(given)
        if index < 0 or (self.classes is not None and index >= len(self.classes)):
            most = "" if self.classes is None else f" to {len(self.classes) - 1}"
            raise ValueError(f"expected {name} as an index from 0{most}, got {index}")
        return index

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The margin of each example's label, shape ``(batch,)``.

        Raises:
            ValueError: if logits and labels have other shapes or types than the class describes.
        """
        logits, labels = self._predict(module, batch)
        labels = one_per_example("labels", labels, _OTHERWISE)
        if logits.ndim not in (1, 2) or logits.shape[0] != labels.shape[0]:
            raise ValueError(
                f"expected logits of shape (batch, classes), (batch, 1) or (batch,) for {labels.shape[0]} labels,"
                f" received {tuple(logits.shape)}; {_OTHERWISE}"
            )
        if self.against is not None:
            return _difference(_both_logits(logits), labels, self.against)
        if logits.ndim == 1 or logits.shape[1] == 1:
            return binary_log_odds(logits.reshape(-1), labels)
        if labels.is_floating_point():
            raise ValueError(
                f"expected labels as integer class indices for {logits.shape[1]} classes, received {labels.dtype};"
                f" {_OTHERWISE}"
            )
        return log_odds(logits, labels)

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says that the label is outside the classes, if so."""
        logits, labels = self._predict(module, batch)
        classes = _num_classes(logits)
        label = labels.flatten()[0].item()
        if label in range(classes):
            return None if label != self.against else f"its label is {label}, which is compared with itself (against=)"
        return (
            f"its label is {label}, and the model has {classes} classes, 0 {'to' if classes > 2 else 'and'}"
            f" {classes - 1}; leave such examples out of the dataset"
        )

    def suspicion(self, module: nn.Module, batch: Any) -> str | None:
        """Says that the module returns probabilities of the classes in place of logits, if so."""
        logits, _ = self._predict(module, batch)
        if sums_to_one(logits):
            return takes_for_logits(module, self, "the logarithms")
        if logits.shape[1:].numel() == 1 and ends_in_sigmoid(logits):
            return takes_for_logits(module, self, "the log-odds (torch.logit)")
        return None

    def probabilities(self, module: nn.Module, batch: Any) -> Tensor:
        """The probability of each class, shape ``(batch, classes)``, in float32 or better."""
        logits = _both_logits(self._logits(module, batch))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)

    def prediction(self, module: nn.Module, batch: Any) -> Tensor:
        """Whether there is a label, the label, and the probability of each class; shape ``(batch, 2 + classes)``."""
        return beside_truth(self.truth(batch), self.probabilities(module, batch))

    def describe_prediction(self, prediction: Tensor) -> str:
        """The most probable class and the label, each with its probability."""
        known, label, *probabilities = prediction.tolist()
        best = max(range(len(probabilities)), key=probabilities.__getitem__)

        def named(index: int) -> str:
            return f"{self.classes[index] if self.classes else index} ({probabilities[index]:.1%})"

        text = f"predicted {named(best)}"
        if not known:
            return text
        if label == best:
            return f"{text}, as labelled"
        return f"{text}, labelled {named(int(label)) if label in range(len(probabilities)) else f'{label:g}'}"

    def _predict(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits, and the labels to take."""
        if self.labels is None:
            logits, labels = self.predict(module, batch)
            self._require_classes(logits)
            return logits, labels
        if isinstance(batch, AnnotatedBatch):
            return self._logits(module, batch.batch), batch.notes[:, 0]
        logits = self._logits(module, batch)
        scores = _both_logits(logits.detach())
        if self.labels == PREDICTED:
            return logits, scores.argmax(1)
        return logits, torch.full_like(scores[:, 0], self.labels, dtype=torch.int64)  # type: ignore[arg-type]

    def _logits(self, module: nn.Module, batch: Any) -> Tensor:
        """Logits of a batch whose labels are not used."""
        logits = predict(module, batch, without_labels(batch, self.labels_key), self.forward)
        if logits.ndim not in (1, 2):
            raise ValueError(
                "expected logits of shape (batch, classes), (batch, 1) or (batch,), received"
                f" {tuple(logits.shape)}; {_OTHERWISE}"
            )
        self._require_classes(logits)
        return logits

    def _require_classes(self, logits: Tensor) -> None:
        """Check that the model has the classes that are named."""
        count = _num_classes(logits)
        for name, given in (("labels", self.labels), ("against", self.against)):
            if isinstance(given, int) and given >= count:
                raise ValueError(f"{name} is class {given}, but the model has {count} classes, 0 to {count - 1}")
        if self.classes is not None and len(self.classes) != count:
            raise ValueError(f"classes names {len(self.classes)} classes, but the model has {count}")

    def loss(self, output: Tensor) -> Tensor:
        """The cross-entropy at each margin, shape ``(batch,)``."""
        return logistic_loss(output)


def _num_classes(logits: Tensor) -> int:
    """The number of classes; a single logit is that of one of two."""
    return logits.shape[1] if logits.ndim == 2 and logits.shape[1] > 1 else 2


def _both_logits(logits: Tensor) -> Tensor:
    """Logits of shape ``(batch, classes)``; a single logit is that of class 1, and that of class 0 is zero."""
    if logits.ndim == 2 and logits.shape[1] > 1:
        return logits
    single = logits.reshape(-1)
    return torch.stack([torch.zeros_like(single), single], dim=1)


def _difference(logits: Tensor, labels: Tensor, against: int) -> Tensor:
    """The log-probability of each label minus that of another class, in float32 or better; NaN if they are the same."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    classes = labels.long()
    valid = (classes == labels) & (classes >= 0) & (classes < logits.shape[1]) & (classes != against)
    own = logits.gather(1, torch.where(valid, classes, 0).unsqueeze(1)).squeeze(1)
    return (own - logits[:, against]) * nan_unless(valid)
