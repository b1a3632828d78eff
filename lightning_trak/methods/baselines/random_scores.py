"""Random scores: the baseline that every method should beat."""

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.methods.base import MatrixMethod
from lightning_trak.methods.examples import Examples
from lightning_trak.projections.philox import Stream
from lightning_trak.running.data.sources import Data
from lightning_trak.running.trainers import trainer_of


class RandomScores(MatrixMethod):
    """Random numbers, which answer no question: every method should be better than this.

    A positive score means nothing, and there is no unit: scores are independent and uniform between -1 and 1.

    An entry is a function of the seed, its row and its column alone: the first targets get the same scores whether or
    not more follow.

    Args:
        seed: any non-negative integer.
    """

    def __init__(self, seed: int = 0) -> None:
        self._stream = Stream.derive("random scores", seed, 0, "")

    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """Random scores of the shape that the data ask for; see :class:`~lightning_trak.methods.base.MatrixMethod`."""
        num_train, num_targets = len(train), len(targets)
        scores = torch.empty(num_targets, num_train)
        for rows in torch.split(torch.arange(num_targets), 64):
            scores[rows] = self._rows(rows, num_train)
        return scores

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """A random number for each example, which says nothing about its label: the scores of the first target."""
        trainer = trainer_of(trainer)
        return self._rows(torch.tensor([0]), len(Examples(train, "fit", trainer)))[0]

    def _rows(self, rows: Tensor, num_train: int) -> Tensor:
        words = self._stream.words(rows, -(-num_train // 4)).flatten(1)[:, :num_train]
        return (words.double() / 2**31 - 1).float()
