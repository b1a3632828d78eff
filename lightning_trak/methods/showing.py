"""Shows what a method has found to people."""

import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.features.model import ModelCopy
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.predictions import described_predictions
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import target_output
from lightning_trak.reporting.explanations import Describe, describe_of, explain, require_positions
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.reporting.showing import kind_of_file, show
from lightning_trak.running.data.sources import Data, datamodule_of
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.topk import Scores
from lightning_trak.texts.display import Displayed
from lightning_trak.texts.messages import in_one_line
from lightning_trak.texts.printable import counted

RAISES_OUTPUT = (
    "Training on an example with a positive score raises the model's output at the target, on one with a negative score"
    " lowers it."
)
LOWERS_LOSS = (
    "Training on an example with a positive score lowers the model's loss at the target, on one with a negative score"
    " raises it."
)
OTHER_DATA = (
    "the data module gives other training data than those that were scored, so other examples may be shown. If it"
    " splits the data at random in setup, each Trainer that sets it up draws another split: give random_split a"
    " generator with a seed"
)


class _NoBatchesError(ValueError):
    """The model cannot be run on what a dataset without a loader gives."""


class Showing(Displayed):
    """The part of all methods that shows results: in a notebook, in a terminal or in a file."""

    @property
    def meaning(self) -> str:
        """A sentence for readers of scores that says what a positive one means; empty if that is not known."""
        return ""

    def show(
        self,
        scores: Scores,
        train: Data,
        targets: Data,
        *,
        shown: Sequence[int] | None = None,
        k: int = 5,
        largest: bool = True,
        output: ModelOutput | None = None,
        predictions: bool = True,
        describe: Describe | None = None,
        out: str | os.PathLike[str] | None = None,
        trainer: L.Trainer | None = None,
    ) -> None:
        """Show targets with their strongest proponents and opponents, and what the model predicts for them.

        In a notebook they are the output of the cell, with images if items hold any; in a terminal, a table; with
        ``out``, a file.

        Predictions are those of the last checkpoint of a directory; of several runs, means. They need an output that
        overrides :meth:`~lightning_trak.outputs.ModelOutput.prediction`, as
        :class:`~lightning_trak.outputs.ClassificationMargin` does.

        Args:
            scores: what ``score`` or ``attribute`` has returned: all scores, or the best of each target. Scores of
                groups have no examples to show.
            train: the training data, in the order of those that were scored. They may be another view of the same
                examples, such as images without normalization. Of a matrix with columns of some examples alone: these.
            targets: the targets that were scored. For predictions they must be what the model takes: give the loader,
                rather than its dataset, if it has a ``collate_fn`` of its own. On a dataset that the model cannot be
                run on, predictions are left out with a warning.
            shown: positions of the targets to show; default: the first 5.
            k: how many proponents, and how many opponents, each target gets.
            largest: for the best scores at one end: the ``largest`` that ``score`` got.
            output: of the targets, if ``score`` got one.
            predictions: whether to run the trained model, and show what it predicts.
            describe: makes a text of an item of either dataset. Default: the ``describe`` of the data module or of the
                model, or else strings and numbers that the item holds.
            out: file to write: ``.png`` for a picture (extra ``plots``), ``.html`` for a page that needs no other file,
                ``.csv`` for a table with a row for each proponent and opponent.
            trainer: runs the model. None: one on a single device.

        Raises:
            ValueError: if scores and data do not fit together, there is no image for a picture, or ``out`` is another
                kind of file.
            IndexError: if there is no target with one of the positions.
            TypeError: if scores are of another type, ``shown`` is a number, or ``describe`` does not return a str.
        """
        kind_of_file(out)  # raises before the work
        trainer = trainer_of(trainer, progress_bar=False)
        train_set, target_set = Examples(train, "fit", trainer), Examples(targets, "predict", trainer)
        num_train = None if isinstance(scores, Tensor) else self._num_train()  # a matrix has its own number
        if isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] != len(train_set):
            raise ValueError(
                f"the scores have {scores.shape[1]} columns, and train has {counted(len(train_set), 'example')}: give"
                " the examples that were scored, such as Subset(train, positions) or the candidates; columns of groups"
                " have no examples to show"
            )
        saved = SavedScores(scores, len(train_set) if num_train is None else num_train, type(self).__name__, largest)
        saved.require_scores("cannot show these scores")
        chosen = range(min(5, len(target_set))) if shown is None else shown
        describe = describe or describe_of(targets, train, getattr(self, "model", None))
        datasets = [cast(Any, examples.loader.dataset) for examples in (train_set, target_set)]
        explanations = explain(saved, chosen, k, datasets[0], datasets[1], describe)
        if datamodule_of(train) is not None and not self._has_scored(train_set.loader):
            warnings.warn(
                f"{OTHER_DATA}, or show the dataset that was scored",
                stacklevel=2,
            )
        if predictions:
            try:
                texts = self.describe_predictions(trainer, targets, list(chosen), output)
            except _NoBatchesError as error:
                warnings.warn(f"no predictions are shown: {error}", stacklevel=2)
            else:
                explanations = [each._replace(prediction=text) for each, text in zip(explanations, texts, strict=True)]
        show(explanations, f"{saved.method}: {counted(saved.num_train, 'training example')}", out, self.meaning)

    def describe_predictions(
        self,
        trainer: L.Trainer | None,
        targets: Data,
        positions: Sequence[int],
        output: ModelOutput | None = None,
    ) -> list[str | None]:
        """What the trained model predicts for some targets, in words; of several runs, what they predict on average.

        Args:
            trainer: runs the model. None: one on a single device.
            targets: the targets.
            positions: of those to describe.
            output: the output of the targets; None: that of the training examples.

        Returns:
            A text for each position; None if the method has no checkpoints, or the output no predictions.

        Raises:
            ValueError: if targets are a dataset without a loader, and the model cannot be run on it.
        """
        model = self._model_copy()
        if model is None:
            return [None] * len(positions)
        trainer = trainer_of(trainer, progress_bar=False)
        examples, output = Examples(targets, "predict", trainer), target_output(output, model.output)
        if len(positions):
            require_positions(positions, len(examples))
        try:
            return described_predictions(trainer, examples, positions, model, output)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if isinstance(targets, DataLoader) or datamodule_of(targets) is not None:
                raise
            raise _NoBatchesError(
                f"the model cannot be run on batches of the targets as they are ({in_one_line(error)}): give the"
                " DataLoader of the targets, with its collate_fn, in the place of the dataset, or predictions=False"
            ) from error

    def _num_train(self) -> int | None:
        """The number of training examples, if the method knows it."""
        return None

    def _has_scored(self, loader: DataLoader[Any]) -> bool:
        """Whether the scores can be those of these training data, as far as the method knows."""
        return True

    def _model_copy(self) -> ModelCopy | None:
        """A copy of the model for predictions at its checkpoints; None if the method has none."""
        return None
