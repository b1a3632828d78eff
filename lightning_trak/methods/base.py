"""The interfaces that attribution methods share."""

from abc import ABC, abstractmethod

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_trak.running.data import Data


class LabelStatistic(ABC):
    """A way to say how suspicious the label of each training example is."""

    @abstractmethod
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """How suspicious the label of each training example is.

        Methods that attribute outputs to training examples give the size of the self-influence, which is an example's
        score at itself. Examples with a high one are learned on their own, not from what they share with others. They
        are often rare or have a wrong label (Koh and Liang 2017, arXiv 1703.04730, section 5.4; Pruthi et al. 2020,
        arXiv 2002.08484, section 4.1). The size is taken because the score of a residual has the residual's sign.
        Other methods say in this method what they give.

        Args:
            trainer: any Trainer, which is left as it was.
            train: the training data, with the labels that the model was trained on.

        Returns:
            On every rank a CPU Tensor ``(num_train,)``, in the order of the dataset: the higher, the more suspicious.
            Numbers of different methods cannot be compared.

        Raises:
            ValueError: if the method says nothing about labels.
        """


class Method(LabelStatistic):
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

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        raise ValueError(
            f"{type(self).__name__} does not say whether a label is wrong; use a method that does, such as TRAK,"
            " EKFACInfluence, KNNShapley or TrainingLoss"
        )
