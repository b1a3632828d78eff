"""The interface that all attribution methods share."""

from abc import ABC, abstractmethod

import lightning as L
from torch import Tensor

from lightning_trak.running.data import Data


class Method(ABC):
    """A way to say how much each training example counts for each target."""

    @abstractmethod
    def attribute(self, trainer: L.Trainer, train: Data, targets: Data) -> Tensor:
        """Score every target against every training example.

        Args:
            trainer: any Trainer, which is left as it was.
            train: the training data, in the order of the scores' columns, whatever its sampler does.
            targets: the targets, in the order of the scores' rows.

        Returns:
            On the CPU, shape ``(num_targets, num_train)``. A positive score says that training on the example helps the
            target: raises its output, or looks like it.
        """
