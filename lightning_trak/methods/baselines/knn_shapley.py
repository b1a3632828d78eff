"""Shapley values of the training examples for a nearest-neighbour classifier on representations."""

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import positive, require_one_of, require_options, shows_options_of
from lightning_trak.methods.baselines.representations import RepresentationMethod, RepresentationOptions
from lightning_trak.methods.baselines.similarity import SIMILARITIES, Similarity, similarities
from lightning_trak.methods.examples import Examples
from lightning_trak.running.data.sources import Data
from lightning_trak.running.trainers import trainer_of

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
        **options: ``layer``, ``forward``, ``pool``, ``labels_key`` and ``weights_only``, see
            :class:`~lightning_trak.methods.baselines.representations.RepresentationMethod`.
    """

    @shows_options_of(RepresentationMethod.__init__)
    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        k: int = 10,
        similarity: Similarity = "l2",
        **options: Unpack[RepresentationOptions],
    ) -> None:
        require_options(type(self), options, RepresentationOptions)
        require_one_of("similarity", similarity, SIMILARITIES)
        super().__init__(model, checkpoints, **options)
        self.k = positive("k", k)
        self.similarity: Similarity = similarity

    @property
    @override
    def meaning(self) -> str:
        return (
            "An example with a positive score adds votes for the target's label among its nearest neighbours, one with"
            " a negative score takes them away. Scores say nothing about training."
        )

    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """Shapley values, averaged over checkpoints; see :class:`~lightning_trak.methods.base.MatrixMethod`."""
        train_labels, target_labels = (self.labels(trainer, examples) for examples in (train, targets))
        values = torch.zeros(len(targets), len(train))
        for train_vectors, target_vectors in self.represent(trainer, train, targets):
            for block, nearness in similarities(target_vectors, train_vectors, self.similarity, _TARGETS):
                values[block] += knn_shapley_values(nearness, target_labels[block, None] == train_labels, self.k)
        return values / len(self.checkpoints)

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """Minus what the example adds to the votes for the labels of all other training examples.

        For each training example as the target, the Shapley values are those of all others: no example votes for
        itself. An example with a wrong label votes wrongly among its neighbours (Jia et al. 2019, arXiv 1908.08619).
        """
        trainer = trainer_of(trainer)
        examples = Examples(train, "fit", trainer)
        labels, count = self.labels(trainer, examples), len(examples)
        if count < 2:
            raise ValueError("there is only one training example, and nothing to compare it with")
        values = torch.zeros(count, dtype=torch.float64)
        for (vectors,) in self.represent(trainer, examples):
            for block, nearness in similarities(vectors, vectors, self.similarity, _TARGETS):
                agrees = labels[block, None] == labels
                # As the last of all, and with another label, an example changes no value of the others.
                nearness[:, block].fill_diagonal_(-torch.inf)
                agrees[:, block].fill_diagonal_(False)
                values += knn_shapley_values(nearness, agrees, self.k).sum(0)
        return -values / len(self.checkpoints)


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
    # Rounded, so that neighbours at the same distance are ties, although sums in another order round differently.
    order = nearness.float().argsort(dim=1, descending=True, stable=True)
    votes = agrees.double().gather(1, order)
    place = torch.arange(1, nearness.shape[1] + 1, dtype=torch.float64)
    steps = torch.diff(votes, dim=1, append=votes.new_zeros(len(votes), 1)).neg() * place.clamp(max=k) / (k * place)
    return torch.empty_like(votes).scatter_(1, order, steps.flip(1).cumsum(1).flip(1))
