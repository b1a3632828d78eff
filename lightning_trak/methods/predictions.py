"""What all checkpoints together predict, so that each explains the same class of a target."""

import lightning as L
import torch

from lightning_trak.features.model import ModelCopy
from lightning_trak.methods.examples import Examples
from lightning_trak.outputs import ModelOutput
from lightning_trak.running.labels import with_labels

_TOGETHER = 1 << 16  # targets whose probabilities are in memory at once


def with_predictions(trainer: L.Trainer, targets: Examples, model: ModelCopy, output: ModelOutput | None) -> Examples:
    """The targets, with the labels that the ensemble of all checkpoints predicts, if the output asks for these.

    The label is the class with the highest mean probability over checkpoints; of equal ones, the first. A single
    checkpoint needs none: the output takes what it predicts.

    Args:
        trainer: runs the passes. Its ranks share them, and get the same labels.
        targets: the targets.
        model: a copy of the model, which is used up.
        output: of the targets, if it is another one than that of the training examples.

    Returns:
        The targets as they are, or with a :class:`~lightning_trak.running.labels.LabelledBatch` for each batch.

    Raises:
        ValueError: if a probability is not finite.
    """
    count = len(model.checkpoints)
    if output is None or not output.predicts_labels or count == 1:
        return targets
    asked, total = model.with_output(output).output, len(targets)
    parts = [range(start, min(start + _TOGETHER, total)) for start in range(0, total, _TOGETHER)]
    labels = []
    for part in parts:
        sums = torch.zeros((), dtype=torch.float64)
        for checkpoint in range(count):
            model.load(checkpoint, trainer.strategy.root_device)
            what = f"the prediction {model.place}"
            sums = sums + targets.map(trainer, model.module, asked.probabilities, what, model.original, part)
        labels.append(sums.argmax(1))
    return Examples(with_labels(targets.loader, torch.cat(labels)), "predict", trainer, targets.datamodule)
