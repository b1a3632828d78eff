"""Near-duplicates among training examples: groups of them, without the matrix of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_trak.checks import real
from lightning_trak.cleaning.ranking import Ranking
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods import FeatureMethod
from lightning_trak.methods.baselines.representations import RepresentationMethod
from lightning_trak.methods.examples import Examples
from lightning_trak.projections.factors import GradientFactors
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.sources import Data
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.base import full_precision, with_float64

Vectors = Callable[[int, range], Tensor]  # of a checkpoint, and of a range of examples: (len(range), k)

_ROWS = 1024  # examples in a block
_BLOCK_BYTES = 1 << 26  # of a block's vectors
_ROUNDING = 1e-6  # of a cosine in float32


def duplicates(
    method: FeatureMethod | RepresentationMethod, trainer: L.Trainer | None, train: Data, threshold: float = 0.97
) -> Ranking:
    """Training examples that are nearly the same to the model, in groups.

    Two examples are duplicates if the cosine of their vectors, averaged over checkpoints, is at least the threshold. A
    group holds all examples that a chain of duplicates connects. The vectors are

    - of a method over features, the stored features: gradients of the output. They tell examples with different labels
      apart if the output depends on the label. A threshold of 0.97 is a good start. Rounding to 4 bits lowers the
      cosine of examples that are not the same by about 0.01.
    - of :class:`~lightning_trak.methods.RepresentationSimilarity` and :class:`~lightning_trak.methods.KNNShapley`, the
      representations: the same image with two labels is a duplicate. They are more alike: start with 0.999.

    All pairs are compared, a block of them at a time: n^2 / 2 inner products, and memory for two blocks and one number
    for each example. A vector of zeros is like no other.

    Args:
        method: what has the vectors. A method over features makes them if they are not there.
        trainer: as for the method; None: a new one on a single device. Its device computes. If its processes run, they
            share the work.
        train: the training data.
        threshold: the least cosine of duplicates, above 0 and up to 1.

    Returns:
        The duplicates, with the number of the group as :attr:`~lightning_trak.cleaning.Ranking.groups` and the highest
        cosine with another example as the score. Groups with the highest cosines come first. In a group, examples have
        the order of the dataset. Empty if there are no duplicates.

    Raises:
        TypeError: if the method has no vectors.
        ValueError: if the threshold is out of range, or the method keeps gradients as factors (ExactKernel).
    """
    if not 0 < real("threshold", threshold) <= 1:
        raise ValueError(f"threshold must be above 0 and up to 1, got {threshold}")
    trainer = trainer_of(trainer)
    examples, device = Examples(train, "fit", trainer), with_float64(trainer.strategy.root_device)
    if isinstance(method, FeatureMethod):
        if isinstance(method.settings.projection, GradientFactors):
            raise ValueError(
                f"{type(method).__name__} keeps gradients as factors, which have no cosine: use TRAK, or"
                " RepresentationSimilarity"
            )
        method.featurize(trainer, train)
        store = method.open_store(trainer)
        (vectors, spans), count = _stored(store, device), store.num_checkpoints
    elif isinstance(method, RepresentationMethod):
        matrices = [found for (found,) in method.represent(trainer, examples)]
        vectors, count = (lambda checkpoint, span: matrices[checkpoint][span.start : span.stop]), len(matrices)
        spans = _cut(range(len(examples)), max(matrix.shape[1] for matrix in matrices))
    else:
        raise TypeError(
            f"{type(method).__name__} has no vectors to compare: use TRAK or another method over features, or"
            " RepresentationSimilarity"
        )
    return _ranking(*near_duplicates(vectors, spans, count, threshold, device, Ranks.of(trainer)), examples)


def near_duplicates(
    vectors: Vectors,
    spans: Sequence[range],
    num_checkpoints: int,
    threshold: float,
    device: torch.device,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Groups of examples with vectors in nearly the same direction.

    Args:
        vectors: gives the vectors of some examples at a checkpoint.
        spans: the blocks that examples are compared in, in order.
        num_checkpoints: cosines are averaged over them.
        threshold: the least cosine of two duplicates.
        device: computes.
        ranks: the processes that share the work; all must call this.

    Returns:
        On every rank, for each example the first example of its group, which is itself if it has no duplicates, int64
        ``(n,)``; and the highest cosine with a duplicate, or 0, float64 ``(n,)``.
    """
    total = spans[-1].stop
    firsts, best = torch.arange(total), torch.zeros(total, dtype=torch.float64)
    pairs = list(combinations_with_replacement(spans, 2))
    with full_precision(device):
        for number in ranks.share(len(pairs)):
            left, right = pairs[number]
            cosines = torch.zeros(len(left), len(right), device=device)
            for checkpoint in range(num_checkpoints):
                one = _unit(vectors(checkpoint, left), device)
                other = one if left == right else _unit(vectors(checkpoint, right), device)
                cosines += one @ other.T
            cosines /= num_checkpoints
            alike = cosines >= min(threshold, 1 - _ROUNDING)
            if left == right:
                alike = alike.triu(1)  # each pair once
            rows, columns = alike.nonzero(as_tuple=True)
            values = cosines[rows, columns].cpu().double().clamp_(max=1)
            rows, columns = rows.cpu() + left.start, columns.cpu() + right.start
            for positions in (rows, columns):
                best.scatter_reduce_(0, positions, values, "amax")
            _connect(firsts, rows, columns)
    for others, values in ranks.gather((firsts.clone(), best.clone())):
        _connect(firsts, torch.arange(total), others)
        torch.maximum(best, values, out=best)
    return firsts, best


def _connect(firsts: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Join the groups of pairs of examples, where ``firsts`` has the first example of each example's group.

    Each group that meets an earlier one is hooked to it, and then all paths are followed to their ends (Shiloach and
    Vishkin 1982, "An O(log n) parallel connectivity algorithm").
    """
    while True:
        one, other = firsts[rows], firsts[columns]
        apart = one != other
        if not apart.any():
            return
        low, high = torch.minimum(one, other)[apart], torch.maximum(one, other)[apart]
        firsts.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(firsts, further := firsts[firsts]):
            firsts.copy_(further)


def _unit(vectors: Tensor, device: torch.device) -> Tensor:
    """Vectors of length 1, in float32; zeros stay."""
    vectors = vectors.to(device)
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    largest = vectors.abs().amax(1, keepdim=True)
    scaled = torch.where(largest > 0, vectors / largest, 0.0)  # so that squares are in range
    norms = scaled.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, scaled / norms, 0.0).float()


def _stored(store: FeatureStore, device: torch.device) -> tuple[Vectors, list[range]]:
    """The features in a store, and blocks of its examples, none of which is in two shards."""
    k = store.read_stored(0, 0).k
    shards = {span: shard for shard in range(store.num_shards) for span in _cut(store.shard(shard), k)}

    def read(checkpoint: int, span: range) -> Tensor:
        shard = shards[span]
        start = store.shard(shard).start
        rows = store.read_stored(checkpoint, shard)[span.start - start : span.stop - start]
        return rows.moved(lambda tensor: tensor.to(device)).decode().features

    return read, list(shards)


def _cut(examples: range, k: int) -> list[range]:
    return chunked(examples, min(_ROWS, max(1, _BLOCK_BYTES // (4 * k))))


def _ranking(firsts: Tensor, best: Tensor, examples: Examples) -> Ranking:
    """The examples of groups of two or more, the groups with the highest cosines first."""
    sizes = firsts.bincount(minlength=len(firsts))
    highest = torch.zeros_like(best).scatter_reduce_(0, firsts, best, "amax")
    starts = (sizes > 1).nonzero().flatten()
    starts = starts[highest[starts].argsort(descending=True, stable=True)]
    numbers = torch.zeros_like(firsts)
    numbers[starts] = torch.arange(1, len(starts) + 1)
    numbers = numbers[firsts]  # 0 for examples without duplicates
    positions = numbers.argsort(stable=True)[int((numbers == 0).sum()) :]
    groups = tuple(numbers[positions].tolist())
    dataset: Any = examples.loader.dataset
    return Ranking("duplicates", "cosine", positions, best[positions], dataset, groups)
