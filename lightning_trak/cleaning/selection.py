"""Training examples by what they do: wrong labels, and what harms or helps on a validation set."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_trak.cleaning.ranking import Ranking
from lightning_trak.methods import BM25, LabelStatistic, Method, RepresentationSimilarity
from lightning_trak.outputs import DiffusionMean, ModelOutput
from lightning_trak.outputs.base import better_when_higher
from lightning_trak.running.data.sources import Data, single_loader
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.groups import Groups, Labels, require_groups


def wrong_labels(method: LabelStatistic, trainer: L.Trainer | None, train: Data) -> Ranking:
    """All training examples, those with the most suspicious labels first.

    Args:
        method: what says how suspicious a label is. :meth:`~lightning_trak.methods.LabelStatistic.label_suspicion` of
            its class says how.
        trainer: as for the method; None: a new one on a single device.
        train: the training data, with the labels that the model was trained on.

    Returns:
        The ranking. Its scores are the suspicion.

    Raises:
        ValueError: if the method says nothing about labels, or a suspicion is not finite.
    """
    trainer = trainer_of(trainer)
    dataset: Any = single_loader(train, "fit", trainer).dataset
    suspicion = _checked(method.label_suspicion(trainer, train), len(dataset), method)
    return _ranking("wrong labels", "suspicion", suspicion, dataset)


def harmful(method: Method, trainer: L.Trainer | None, train: Data, validation: Data) -> Ranking:
    """The training examples with a negative mean score for a validation set, the lowest first.

    Args:
        method: what scores. If a higher output need not be a better fit, as for a residual, it must be about the loss.
        trainer: as for the method; None: a new one on a single device.
        train: the training data.
        validation: the targets, as for the method. They should not be training examples.

    Returns:
        The ranking; empty if no mean score is negative.

    Raises:
        ValueError: if scores are about an output that is not better when it is higher, say nothing about the effect of
            training, or are not finite.
    """
    if isinstance(method, (BM25, RepresentationSimilarity)):
        raise ValueError(
            f"scores of {type(method).__name__} say how alike examples are, not what training on them does, so that a"
            " negative one is no harm: use a method that attributes outputs, such as TRAK or EKFACInfluence"
        )
    trainer = trainer_of(trainer)
    dataset: Any = single_loader(train, "fit", trainer).dataset
    scores = _mean_scores(method, trainer, train, validation, len(dataset))
    order = scores.argsort(stable=True)
    order = order[scores[order] < 0]
    return Ranking("harmful examples", "mean score", order, scores[order], dataset)


def useful(
    method: Method,
    trainer: L.Trainer | None,
    train: Data,
    validation: Data,
    groups: Groups | Labels | None = None,
) -> Ranking:
    """All training examples, those with the highest mean scores for a validation set first.

    Args:
        method: as for :func:`harmful`.
        trainer: as for the method; None: a new one on a single device.
        train: the training data.
        validation: as for :func:`harmful`.
        groups: the group of each training example, such as its class or source, to select as many of each: first come
            the best examples of all groups, then the second best of all groups, and so on. An example with None is
            left out.

    Returns:
        The ranking, of which ``ranking[:k]`` is the selection. The last ones may have negative scores.

    Raises:
        ValueError: as :func:`harmful`, and if groups do not fit the training data or have weights.
    """
    trainer = trainer_of(trainer)
    dataset: Any = single_loader(train, "fit", trainer).dataset
    chosen = None if groups is None else require_groups("groups", groups, len(dataset), "training examples")
    if chosen is not None and (chosen.weights != 1).any():
        raise ValueError("groups have weights, which say nothing about how many examples to select: leave them out")
    scores = _mean_scores(method, trainer, train, validation, len(dataset))
    return _ranking("useful examples", "mean score", scores, dataset, chosen)


def _ranking(what: str, measure: str, scores: Tensor, dataset: Any, groups: Groups | None = None) -> Ranking:
    """The examples with the highest scores first, or a round of the best of each group after another."""
    order = scores.argsort(descending=True, stable=True)
    if groups is None:
        return Ranking(what, measure, order, scores[order], dataset)
    order = order[groups.numbers[order] >= 0]
    by_group = groups.numbers[order].argsort(stable=True)
    rounds = torch.empty_like(order)
    rounds[by_group] = torch.cat([torch.arange(size) for size in groups.sizes.tolist()])
    order = order[rounds.argsort(stable=True)]
    names = tuple(groups.names[number] for number in groups.numbers[order].tolist())
    return Ranking(what, measure, order, scores[order], dataset, names)


def _mean_scores(method: Method, trainer: L.Trainer, train: Data, validation: Data, count: int) -> Tensor:
    """The mean over targets of the score of each training example, float64, ``(num_train,)``."""
    _require_better_when_higher(method)
    single_loader(validation, "predict", trainer)  # raises before the work if there are several loaders
    return _checked(method.attribute(trainer, train, validation, aggregate="mean")[0], count, method)


def _require_better_when_higher(method: Method) -> None:
    """Refuse scores of an output that can rise while the loss rises.

    Raises:
        ValueError: if the method is about such an output.
    """
    output = getattr(method, "output", None)
    if isinstance(output, DiffusionMean):
        raise ValueError(
            "DiffusionMean says how far a prediction moves, not whether it gets better: use DiffusionLoss as the output"
        )
    if not isinstance(output, ModelOutput) or getattr(method, "effect_on", "output") == "loss":
        return
    if not better_when_higher(output):
        name = type(output).__name__
        raise ValueError(
            f"the loss can rise with {name}, so that a mean of its scores does not say what helps: use TracIn,"
            " GradientDot or GradientCosine, which are about the loss, or NegativeLoss as the output"
        )


def _checked(scores: Tensor, count: int, method: LabelStatistic) -> Tensor:
    """The scores in float64, if there is a finite one for each training example."""
    name = type(method).__name__
    if scores.shape != (count,):
        raise ValueError(
            f"expected {count} numbers from {name}, one for each training example, got {tuple(scores.shape)}"
        )
    finite = scores.isfinite()
    if not finite.all():
        first = int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"the number of {name} for training example {first} is {float(scores[first])}, not finite; look for NaN in"
            " the weights or the data"
        )
    return scores.double()
