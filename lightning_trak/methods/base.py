"""The interface that all attribution methods share."""

from abc import ABC, abstractmethod

import lightning as L
from torch import Tensor

from lightning_trak.running.data import Data


class Method(ABC):
    """A way to say how much each training example counts for each target.

    Methods answer different questions. The first lines of each class say which one, what a positive score means, and in
    which unit scores are.
    """

    @property
    def used_masks(self) -> Tensor | None:
        """The subsets whose models the scores are made with: bool ``(num_used, num_train)``; None if there are none.

        Scores must not be measured on these subsets:
        :class:`~lightning_trak.LinearDatamodelingScore` takes them to refuse it.
        """
        return None

    @abstractmethod
    def attribute(
        self, trainer: L.Trainer | None = None, train: Data | None = None, targets: Data | None = None
    ) -> Tensor:
        """Score every target against every training example.

        Args:
            trainer: any Trainer, which is left as it was. None: one on a single device, see
                :func:`~lightning_trak.running.trainers.trainer_of`.
            train: the training data, in the order of the scores' columns, whatever its sampler does.
            targets: the targets, in the order of the scores' rows.

        Returns:
            On the CPU, shape ``(num_targets, num_train)``. The first lines of the class say what a positive score means
            and in which unit scores are.
        """
