"""What the trained models predict for targets: the class that all checkpoints explain, and words for people."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_trak.features.model import ModelCopy
from lightning_trak.methods.examples import Examples, Rows
from lightning_trak.outputs import ModelOutput
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.annotated import annotated
from lightning_trak.running.data.loaders import like
from lightning_trak.running.data.loading import batch_size_of

_TOGETHER = 1 << 16  # targets whose probabilities are in memory at once


def with_predictions(
    trainer: L.Trainer, targets: Examples, copy_model: Callable[[], ModelCopy], output: ModelOutput | None
) -> Examples:
    """The targets, with the labels that the trained models predict, if the output asks for these.

    The label is the class with the highest mean probability over the models at the ends of their runs; of equal ones,
    the first. All checkpoints explain it, also earlier ones, where the model may have predicted another. A single
    checkpoint needs no labels: the output takes what it predicts.

    Args:
        trainer: runs the passes. Its ranks share them, and get the same labels.
        targets: the targets.
        copy_model: makes a copy of the model.
        output: the output of the targets; None: that of the training examples.

    Returns:
        The targets as they are, or with a :class:`~lightning_trak.running.data.annotated.AnnotatedBatch` for each
        batch.

    Raises:
        ValueError: if a probability is not finite.
    """
    if output is None or not output.predicts_labels:
        return targets
    model = copy_model()
    if len(model.checkpoints) == 1:
        return targets
    asked = model.with_output(output).output
    parts = chunked(range(len(targets)), _TOGETHER)
    labels = [_means(trainer, targets, model, asked.probabilities, part).argmax(1) for part in parts]
    return targets.with_loader(annotated(targets.loader, torch.cat(labels).unsqueeze(1)))


def described_predictions(
    trainer: L.Trainer, targets: Examples, positions: Sequence[int], model: ModelCopy, output: ModelOutput | None
) -> list[str | None]:
    """What the models at the ends of their runs predict for some targets, on average, in words.

    Args:
        trainer: runs the passes.
        targets: all targets.
        positions: of those to describe.
        model: a copy of the model, which is used up.
        output: the output of the targets; None: that of the training examples.

    Returns:
        A text for each position; None where the output has no prediction that means something to people.

    Raises:
        ValueError: if a number is not finite.
    """
    asked = model.output if output is None else model.with_output(output).output
    if type(asked).prediction is ModelOutput.prediction or not positions:
        return [None] * len(positions)
    loader = targets.loader
    # The last one counts twice, because a model may need more than one example.
    subset: Subset[Any] = Subset(cast(Any, loader.dataset), [*positions, positions[-1]])
    size = min(len(subset), max(2, batch_size_of(loader)))
    chosen = targets.with_loader(like(loader, subset, batch_size=size))
    means = _means(trainer, chosen, model, cast(Rows, asked.prediction))
    return [asked.describe_prediction(row) for row in means[: len(positions)]]


def _means(
    trainer: L.Trainer, targets: Examples, model: ModelCopy, predict: Rows, positions: range | None = None
) -> Tensor:
    """The means of predictions over the models at the ends of their runs, see :meth:`Examples.map`."""
    sums = torch.zeros((), dtype=torch.float64)
    # People ask about the ends of runs, not about what came before.
    ends = [number for number, checkpoint in enumerate(model.checkpoints) if checkpoint.final]
    for checkpoint in ends:
        model.load(checkpoint, trainer.strategy.root_device)
        what = f"the prediction {model.place}"
        sums = sums + targets.map(trainer, model.module, predict, what, model.original, positions)
    return sums / len(ends)
