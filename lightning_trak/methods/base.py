"""The interfaces that attribution methods share."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, overload

import lightning as L
import torch
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_trak.checks import require_options, shows_options_of
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.questions import (
    Asked,
    AttributedQuestion,
    is_positions,
    require_ends,
    require_interval,
    target_rows,
)
from lightning_trak.methods.showing import Showing
from lightning_trak.outputs import ModelOutput
from lightning_trak.running.data.sources import Data
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.groups import added_up, train_sums
from lightning_trak.scoring.intervals import Interval, bounds, with_bounds
from lightning_trak.scoring.topk import BothEnds, Scores, TopK, all_indices, best_of


class LabelStatistic(ABC):
    """A way to say how suspicious the label of each training example is."""

    @abstractmethod
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """How suspicious the label of each training example is.

        Methods by a Newton step (TRAK, ExactKernel, influence functions) give the loss that the model would have at the
        example, had it not been trained on it: that of the output minus the example's score at itself, both averaged
        over checkpoints. It is high if the rest of the data speak against the label, also where the model has learned
        the label by heart. Of a squared error it is that of the deleted residual, to first order in the leverage (Cook
        and Weisberg 1982, "Residuals and Influence in Regression", section 2.2).

        Other methods that attribute outputs or losses to training examples give the size of the self-influence, which
        is an example's score at itself. Examples with a high one are learned on their own, not from what they share
        with others. They are often rare or have a wrong label (Koh and Liang 2017, arXiv 1703.04730, section 5.4;
        Pruthi et al. 2020, arXiv 2002.08484, section 4.1). The size is taken because the score of a residual has the
        residual's sign. All others say in this method what they give.

        Args:
            trainer: any Trainer, which is left as it was.
            train: the training data, with the labels that the model was trained on.

        Returns:
            On every rank a CPU Tensor ``(num_train,)``, in the order of the dataset: the higher, the more suspicious.
            Numbers of different methods cannot be compared.

        Raises:
            ValueError: if the method says nothing about labels.
        """


class Method(Showing, LabelStatistic):
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

    @overload
    def attribute(
        self,
        trainer: L.Trainer | None = None,
        train: Data | None = None,
        targets: Data | None = None,
        top_k: None = None,
        largest: None = None,
        interval: None = None,
        **question: Unpack[AttributedQuestion],
    ) -> Tensor: ...

    @overload
    def attribute(
        self,
        trainer: L.Trainer | None = None,
        train: Data | None = None,
        targets: Data | None = None,
        *,
        top_k: int,
        largest: None = None,
        interval: None = None,
        **question: Unpack[AttributedQuestion],
    ) -> BothEnds: ...

    @overload
    def attribute(
        self,
        trainer: L.Trainer | None = None,
        train: Data | None = None,
        targets: Data | None = None,
        *,
        top_k: int,
        largest: bool,
        interval: None = None,
        **question: Unpack[AttributedQuestion],
    ) -> TopK: ...

    @overload
    def attribute(
        self,
        trainer: L.Trainer | None = None,
        train: Data | None = None,
        targets: Data | None = None,
        top_k: int | None = None,
        largest: bool | None = None,
        *,
        interval: float,
        **question: Unpack[AttributedQuestion],
    ) -> Interval: ...

    @shows_options_of(None)
    def attribute(
        self,
        trainer: L.Trainer | None = None,
        train: Data | None = None,
        targets: Data | None = None,
        top_k: int | None = None,
        largest: bool | None = None,
        interval: float | None = None,
        **question: Unpack[AttributedQuestion],
    ) -> Any:
        """Score every target against every training example.

        Args:
            trainer: a Trainer, which is left as it was; the class says which ones it can use. None: one on a single
                device, see :func:`~lightning_trak.running.trainers.trainer_of`; then give the data by name.
            train: the training data, in the order of the scores' columns. The sampler of a loader does not matter.
            targets: the targets, in the order of the scores' rows.
            top_k: keep only this many training examples with the highest scores of each target, and as many with the
                lowest.
            largest: whether ``top_k`` keeps only the highest scores, or only the lowest; default: both.
            interval: confidence level of an interval for each mean or sum over targets, by bootstrap over the targets
                of its group. Targets are then scored one by one.
            **question: ``output``, ``aggregate``, ``groups``, ``train_groups`` and ``candidates``, see
                :class:`~lightning_trak.methods.questions.AttributedQuestion`.

        Returns:
            On the CPU, shape ``(num_targets, num_train)``, or with groups a row or column for each; with ``top_k`` a
            :class:`~lightning_trak.scoring.BothEnds` or :class:`~lightning_trak.scoring.TopK`; with ``interval`` an
            :class:`~lightning_trak.scoring.Interval` of these. The first lines of the class say what a positive score
            means and in which unit scores are.

        Raises:
            ValueError: if the method cannot answer this, or groups do not fit the data.
        """
        require_options(self.attribute, question, AttributedQuestion)
        require_ends(top_k, largest)
        trainer = trainer_of(trainer)
        if train is None or targets is None:
            raise TypeError("there are no data; pass the training data and the targets, train= and targets=")
        if is_positions(question.get("candidates")):
            raise TypeError(
                "candidates are examples, given as a Dataset or DataLoader; for some training examples use"
                " torch.utils.data.Subset(train, positions), or score(..., train=positions)"
            )
        return self._attribute(trainer, train, targets, top_k, largest, interval, question)

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        raise ValueError(
            f"{type(self).__name__} does not say whether a label is wrong; use a method that does, such as TRAK,"
            " EKFACInfluence, KNNShapley or TrainingLoss"
        )

    @abstractmethod
    def _attribute(
        self,
        trainer: L.Trainer,
        train: Data,
        targets: Data,
        top_k: int | None,
        largest: bool | None,
        interval: float | None,
        question: AttributedQuestion,
    ) -> Scores | Interval:
        """See :meth:`attribute`."""


class DataMethod(Method):
    """Base of the methods that score from the data themselves, without stored features."""

    _without_output: ClassVar[str] = (
        "its scores are not about an output of the model. TRAK, TracIn, GradientDot, GradientCosine, influence"
        " functions and Metagradient take it"
    )
    _without_candidates: ClassVar[str | None] = (  # None: the method scores them
        "it scores training examples alone. TRAK, TracIn, GradientDot, GradientCosine and influence functions score"
        " examples that are not in the training set"
    )

    def _attribute(
        self,
        trainer: L.Trainer,
        train: Data,
        targets: Data,
        top_k: int | None,
        largest: bool | None,
        interval: float | None,
        question: AttributedQuestion,
    ) -> Scores | Interval:
        """See :meth:`attribute`."""
        output = self._target_output(question.get("output"))
        candidates = question.get("candidates")
        if candidates is not None and self._without_candidates is not None:
            raise ValueError(f"{type(self).__name__} takes no candidates=: {self._without_candidates}")
        columns, rows = Examples(train, "fit", trainer), Examples(targets, "predict", trainer, output=output)
        others = None if candidates is None else Examples(candidates, "fit", trainer)
        (sums,) = target_rows(question, [len(rows)])
        require_interval(interval, sums)
        groups = train_sums(question.get("train_groups"), len(columns if others is None else others))
        asked = Asked(output, sums if interval is None else None, groups, others)
        found = self._scores(trainer, columns, rows, asked)
        if interval is None:
            return found if top_k is None else best_of(found, top_k, largest)
        assert sums is not None
        total, mean = sums.added(found, 0).to(found.dtype), question.get("aggregate") == "mean"
        if top_k is None:
            return with_bounds(total, bounds(found, sums, mean, interval))
        best = best_of(total, top_k, largest)
        kept = torch.unique(all_indices(best))
        return with_bounds(best, bounds(found[:, kept], sums, mean, interval), kept)

    @abstractmethod
    def _scores(self, trainer: L.Trainer, train: Examples, targets: Examples, asked: Asked) -> Tensor:
        """The scores, on the CPU, with the rows and columns that are asked for."""

    def _target_output(self, output: ModelOutput | None) -> ModelOutput | None:
        """The output of the targets; None if it is that of the training examples.

        Raises:
            ValueError: if the method has no output.
        """
        if output is not None:
            raise ValueError(f"{type(self).__name__} takes no output=: {self._without_output}")
        return None


class MatrixMethod(DataMethod):
    """Base of the methods that make the whole matrix of scores at once, also for a few of its numbers.

    A subclass gives :meth:`matrix`. Sums, the best of the scores and intervals follow from it.
    """

    def _scores(self, trainer: L.Trainer, train: Examples, targets: Examples, asked: Asked) -> Tensor:
        matrix = self.matrix(trainer, train, targets)
        return added_up(matrix, asked.rows, asked.columns).to(matrix.dtype)

    @abstractmethod
    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """The score of every target for every training example.

        Args:
            trainer: any Trainer, which is left as it was.
            train: the training data.
            targets: the targets.

        Returns:
            On the CPU, shape ``(num_targets, num_train)``.
        """
