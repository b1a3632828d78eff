"""Similarity of representations: training examples that look like the target to the model."""

from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import require_one_of
from lightning_trak.methods.baselines.representations import RepresentationMethod
from lightning_trak.methods.examples import Examples

Similarity = Literal["dot", "cosine", "l2"]
SIMILARITIES = ("dot", "cosine", "l2")

# Targets are compared in blocks, whose working memory is in float64.
_TARGETS = 1024


class RepresentationSimilarity(RepresentationMethod):
    """How much does the training example look like the target to the model?

    A positive score says that the two representations point in similar directions; distances are scored negative, so
    that a higher score is always more similar. The unit is that of the similarity: by default a cosine, from -1 to 1. A
    score says nothing about the effect of training.

    Hanawa et al. 2021 (arXiv 2006.04528) compare such measures; minus the distance is the "representation distance" of
    Park et al. 2023 (arXiv 2303.14186).

    Args:
        model: the trained model.
        checkpoints: scores are averaged over them.
        similarity: ``"dot"``, ``"cosine"`` (0 for a representation of zeros) or ``"l2"`` (minus the distance).
        **options: ``layer``, ``forward``, ``pool`` and ``weights_only``, see
            :class:`~lightning_trak.methods.baselines.representations.RepresentationMethod`.

    Example::

        scores = RepresentationSimilarity(model, "run/snapshots").attribute(trainer, train_loader, target_loader)
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        similarity: Similarity = "cosine",
        **options: Any,
    ) -> None:
        require_one_of("similarity", similarity, SIMILARITIES)
        super().__init__(model, checkpoints, **options)
        self.similarity: Similarity = similarity

    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """Similarities, averaged over checkpoints; see :class:`~lightning_trak.methods.base.MatrixMethod`."""
        scores = torch.zeros(len(targets), len(train))
        for train_vectors, target_vectors in self.represent(trainer, train, targets):
            for start in range(0, len(targets), _TARGETS):
                block = slice(start, start + _TARGETS)
                scores[block] += similarity_matrix(target_vectors[block], train_vectors, self.similarity)
        return scores / len(self.checkpoints)


def similarity_matrix(targets: Tensor, train: Tensor, similarity: Similarity) -> Tensor:
    """Similarity of every target with every training example.

    Args:
        targets: shape ``(num_targets, width)``.
        train: shape ``(num_train, width)``.
        similarity: which kind.

    Returns:
        float64, shape ``(num_targets, num_train)``: in float32 the distances of near neighbours would be all rounding.
    """
    targets, train = targets.double(), train.double()
    if similarity == "l2":
        return -torch.cdist(targets, train)
    if similarity == "cosine":
        targets, train = F.normalize(targets), F.normalize(train)
    return targets @ train.T
