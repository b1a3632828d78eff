"""Shapley values of the training examples for a nearest-neighbour classifier on representations."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_trak.checkpoints.copies import copy_module
from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import require_one_of
from lightning_trak.methods.baselines.representations import RepresentationMethod
from lightning_trak.methods.baselines.similarity import SIMILARITIES, Similarity, similarity_matrix
from lightning_trak.methods.examples import Examples
from lightning_trak.outputs.batches import LABELS_KEYS, LabelsKey, as_keys, one_per_example, split_labels

_TARGETS = 256


class KNNShapley(RepresentationMethod):
    """How much does the training example add to the votes for the target's label, among its nearest neighbours?

    A positive score says that the example raises the share of votes for the right label, on average over smaller
    training sets. The unit is a share of the votes: the scores of a target add up to the share, from 0 to 1, that the
    whole training set gives. A score says nothing about training the model. These are the exact Shapley values of a
    K-nearest-neighbour classifier (Jia et al. 2019, arXiv 1908.08619, theorem 1).

    The utility of a set of training examples for a target is the number of votes for the target's label among its K
    nearest neighbours in the set, divided by K. Over several checkpoints, values are averaged: they are those of the
    average utility.

    Args:
        model: the trained model.
        checkpoints: values are averaged over them.
        k: the number of neighbours.
        similarity: what makes a neighbour near: ``"l2"``, ``"cosine"`` or ``"dot"``. Of equally near ones, the first
            in the training data comes first.
        labels_key: where the labels are, if batches are not tuples ``(inputs, ..., labels)``: a key or attribute, a
            position in a tuple, or a function of the batch.
        **options: ``layer``, ``forward``, ``pool`` and ``weights_only``, see
            :class:`~lightning_trak.methods.baselines.representations.RepresentationMethod`.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        k: int = 10,
        similarity: Similarity = "l2",
        labels_key: LabelsKey = LABELS_KEYS,
        **options: Any,
    ) -> None:
        require_one_of("similarity", similarity, SIMILARITIES)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        super().__init__(model, checkpoints, **options)
        self.k = k
        self.similarity: Similarity = similarity
        self.labels_keys = as_keys(labels_key)

    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """Shapley values, averaged over checkpoints; see :class:`~lightning_trak.methods.base.MatrixMethod`."""
        module = copy_module(self.model)  # whose transfer hooks may make the labels
        train_labels, target_labels = (
            examples.map(trainer, module, self._labels, "the label") for examples in (train, targets)
        )
        values = torch.zeros(len(targets), len(train))
        for train_vectors, target_vectors in self.represent(trainer, train, targets):
            for start in range(0, len(targets), _TARGETS):
                block = slice(start, start + _TARGETS)
                nearness = similarity_matrix(target_vectors[block], train_vectors, self.similarity)
                values[block] += knn_shapley_values(nearness, target_labels[block, None] == train_labels, self.k)
        return values / len(self.checkpoints)

    def _labels(self, _: nn.Module, batch: Any) -> Tensor:
        _, labels = split_labels(batch, self.labels_keys)
        if labels.is_floating_point() and labels.dtype.itemsize < 4:
            raise ValueError(
                f"the labels are {labels.dtype}, as the Trainer's precision makes them, in which different labels may"
                " become equal: give them as integers, or use a Trainer of another precision"
            )
        return one_per_example("labels", labels, "nearest neighbours vote for one label per example")


def knn_shapley_values(nearness: Tensor, agrees: Tensor, k: int) -> Tensor:
    r"""The recursion of Jia et al. 2019, theorem 1, for all targets at once.

    With training examples in order of nearness, :math:`a_i` whether the i-th has the target's label, and N of them,

    .. math:: s_N = a_N \frac{\min(K, N)}{K N}, \qquad s_i = s_{i+1} + (a_i - a_{i+1}) \frac{\min(K, i)}{K i}.

    The paper has :math:`s_N = a_N / N`, which takes N to be at least K.

    Args:
        nearness: greater is nearer, shape ``(num_targets, num_train)``.
        agrees: bool, shape ``(num_targets, num_train)``, whether the labels are the same.
        k: the number of neighbours K.

    Returns:
        float64, shape ``(num_targets, num_train)``.
    """
    # Rounded, so that neighbours at the same distance are ties, whatever the order of a sum made of them.
    order = nearness.float().argsort(dim=1, descending=True, stable=True)
    votes = agrees.double().gather(1, order)
    place = torch.arange(1, nearness.shape[1] + 1, dtype=torch.float64)
    steps = torch.diff(votes, dim=1, append=votes.new_zeros(len(votes), 1)).neg() * place.clamp(max=k) / (k * place)
    return torch.empty_like(votes).scatter_(1, order, steps.flip(1).cumsum(1).flip(1))
