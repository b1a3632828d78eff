"""Similarity of representations: training examples that look like the target to the model."""

from collections.abc import Iterator
from typing import Literal, get_args

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack, override

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import require_one_of, require_options, shows_options_of
from lightning_trak.methods.baselines.representations import RepresentationMethod, RepresentationOptions
from lightning_trak.methods.examples import Examples
from lightning_trak.running.data.sources import Data
from lightning_trak.running.trainers import trainer_of

Similarity = Literal["dot", "cosine", "l2"]
SIMILARITIES = get_args(Similarity)

# Targets are compared in blocks, whose working memory is in float64: this many, or fewer with more training examples.
_TARGETS = 1024
_EXAMPLES = 1 << 15
_NEIGHBOURS = 10


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
        **options: ``layer``, ``forward``, ``pool``, ``labels_key`` and ``weights_only``, see
            :class:`~lightning_trak.methods.baselines.representations.RepresentationMethod`.

    Example::

        method = RepresentationSimilarity(model, "run/snapshots")
        scores = method.attribute(trainer, train_loader, target_loader)
    """

    @shows_options_of(RepresentationMethod.__init__)
    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        similarity: Similarity = "cosine",
        **options: Unpack[RepresentationOptions],
    ) -> None:
        require_options(type(self), options, RepresentationOptions)
        require_one_of("similarity", similarity, SIMILARITIES)
        super().__init__(model, checkpoints, **options)
        self.similarity: Similarity = similarity

    @property
    @override
    def meaning(self) -> str:
        return "A score says how alike the example and the target are to the model, and nothing about training."

    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """Similarities, averaged over checkpoints; see :class:`~lightning_trak.methods.base.MatrixMethod`."""
        scores = torch.zeros(len(targets), len(train))
        for train_vectors, target_vectors in self.represent(trainer, train, targets):
            for block, similar in similarities(target_vectors, train_vectors, self.similarity, _TARGETS):
                scores[block] += similar
        return scores / len(self.checkpoints)

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """How much more the example looks like examples with other labels than like examples with its own.

        It is the mean similarity to the ten most similar examples with another label, minus the mean similarity to the
        ten most similar other examples with the same label; fewer where there are fewer. An example that is the only
        one with its label, which may be a misspelt one, is compared with the least similar of all examples instead.

        Raises:
            ValueError: if all examples have the same label.
        """
        trainer = trainer_of(trainer)
        examples = Examples(train, "fit", trainer)
        labels = self.labels(trainer, examples)
        if (labels == labels[0]).all():
            raise ValueError(f"all {len(labels)} examples have the label {labels[0].item()}: none can be wrong")
        scores = torch.zeros(len(examples), dtype=torch.float64)
        for (vectors,) in self.represent(trainer, examples):
            for block, similar in similarities(vectors, vectors, self.similarity, _TARGETS):
                same = labels[block, None] == labels
                foreign = _mean_of_best(similar, ~same)
                same[:, block].fill_diagonal_(False)
                alone = ~same.any(1)
                kindred = _mean_of_best(similar, same).where(~alone, similar.amin(1))
                scores[block] += foreign - kindred
        return scores / len(self.checkpoints)


def _mean_of_best(similar: Tensor, among: Tensor) -> Tensor:
    """Mean of the highest numbers of each row, ``(n,)``, among those that a mask of the same shape holds."""
    best = similar.masked_fill(~among, -torch.inf).topk(min(_NEIGHBOURS, similar.shape[1]), dim=1).values
    there = best > -torch.inf
    return best.where(there, 0.0).sum(1) / there.sum(1)


def similarities(
    targets: Tensor, train: Tensor, similarity: Similarity, at_once: int
) -> Iterator[tuple[slice, Tensor]]:
    """Similarity of every target with every training example, some targets at a time.

    Args:
        targets: shape ``(num_targets, width)``.
        train: shape ``(num_train, width)``.
        similarity: which kind.
        at_once: targets in a block. With more than 32,768 training examples, blocks have fewer, and the same size.

    Yields:
        Which targets, and their similarities, float64, shape ``(targets of the block, num_train)``: in float32 the
        distances of near neighbours would be all rounding.
    """
    own = targets is train
    train = _comparable(train, similarity)
    targets = train if own else _comparable(targets, similarity)
    step = max(1, min(at_once, at_once * _EXAMPLES // len(train)))
    for start in range(0, len(targets), step):
        block = slice(start, min(start + step, len(targets)))
        yield block, _compared(targets[block], train, similarity)


def _comparable(vectors: Tensor, similarity: Similarity) -> Tensor:
    vectors = vectors.double()
    return F.normalize(vectors, eps=torch.finfo(torch.float64).tiny) if similarity == "cosine" else vectors


def _compared(targets: Tensor, train: Tensor, similarity: Similarity) -> Tensor:
    return -torch.cdist(targets, train) if similarity == "l2" else targets @ train.T
