"""Scores of whole datasets of targets, in blocks that fit in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.features.passes.target_features import TargetFeatures
from lightning_trak.features.rows import Features, StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.outputs import ModelOutput
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.loading import batch_size_of, num_examples
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.base import Scorer
from lightning_trak.scoring.groups import Sums
from lightning_trak.scoring.topk import Scores, best_of, join

# Targets are scored in blocks whose features take this much memory. Where each block makes a matrix again, they take as
# much as the matrix, so that making it is not most of the work. A few copies of the features are made on the way.
TARGET_BYTES = 1 << 28


class Kept(NamedTuple):
    """What is kept of the scores.

    Attributes:
        top_k: how many training examples for each target; None: all.
        largest: whether these are the highest scores or the lowest; None: both.
        rows: how targets are added up; None: each has a row.
        columns: how training examples are added up; None: each has a column.
    """

    top_k: int | None = None
    largest: bool | None = None
    rows: Sums | None = None
    columns: Sums | None = None


@dataclass(frozen=True)
class Others:
    """Examples that are not in the store, to score targets against.

    Attributes:
        loader: the loader whose dataset holds them.
        datamodule: the data module that gave the loader, if there is one.
    """

    loader: DataLoader[Any]
    datamodule: L.LightningDataModule | None

    def __len__(self) -> int:
        return num_examples(self.loader)

    def features(self, target_features: TargetFeatures) -> Iterator[tuple[range, list[Features]]]:
        """Positions and features at each checkpoint, rounded as in the store, a block at a time."""
        store = target_features.store
        rows = store.read_stored(0, 0)
        numbers = max(rows.k * store.num_checkpoints, 2 * store.num_examples if store.num_examples < rows.k else 0)
        blocks = _blocks(self.loader, numbers * max(4, store.dtype.floating.itemsize), TARGET_BYTES)
        found = target_features.make(self.loader, blocks, self.datamodule, of=" of train=")
        for examples, features in zip(blocks, found, strict=True):
            yield examples, [StoredFeatures.encode(part, store.dtype).decode() for part in features]


def score_targets(
    target_features: TargetFeatures,
    scorer: Scorer,
    loader: DataLoader[Any],
    datamodule: L.LightningDataModule | None,
    kept: Kept,
    output: ModelOutput | None = None,
    others: Others | None = None,
) -> Scores:
    """Score the examples of a dataset against every stored example.

    Targets that are added up are added before they are scored, where scores are linear in them.

    Args:
        target_features: makes their features.
        scorer: the scorer of the method.
        loader: the loader whose dataset holds the targets.
        datamodule: the data module that gave the loader, if there is one.
        kept: what to keep of the scores.
        output: the output of the targets; None: that of the training examples.
        others: the examples to score them against; None: those in the store. Their features are made again for each
            block of targets.

    Returns:
        On every rank a CPU Tensor ``(num_targets, num_train)``, a TopK or BothEnds; with ``kept.rows`` and
        ``kept.columns``, sums of its rows and columns.
    """
    top_k, largest, rows, columns = kept
    store, trainer = target_features.store, target_features.trainer
    numbers = max(store.read_stored(0, 0).k * store.num_checkpoints, _numbers_kept(store, scorer, kept, others))
    itemsize = max(4, store.dtype.floating.itemsize)
    blocks = _blocks(loader, numbers * itemsize, max(TARGET_BYTES, scorer.remade_bytes))
    if others is not None and len(blocks) > 1 and (rows is None or not scorer.linear):
        rank_zero_info(
            f"features of the {len(others)} examples in train= are made {len(blocks)} times, once for every"
            f" {len(blocks[0])} targets"
        )

    def scored(directions: Sequence[Tensor], top_k: int | None) -> Scores:
        ranks = Ranks.of(trainer)
        if others is None:
            return scorer.score(directions, top_k, largest, ranks, columns)
        features = others.features(target_features)
        return scorer.score_others(directions, features, len(others), top_k, largest, ranks, columns)

    parts: list[Scores] = []
    totals = None if rows is None else _Totals(rows)
    features = target_features.make(loader, blocks, datamodule, output)
    for examples, found in zip(blocks, features, strict=True):
        scorer.fit(trainer.strategy.root_device, Ranks.of(trainer))
        directions = [scorer.directions(checkpoint, part) for checkpoint, part in enumerate(found)]
        if totals is None:
            parts.append(scored(directions, top_k))
        else:
            totals.add(directions if scorer.linear else [cast(Tensor, scored(directions, None))], examples)
    if totals is None:
        return join(parts)
    if scorer.linear:
        return scored(totals.tensors(), top_k)
    (scores,) = totals.tensors()
    left_out = scorer.left_out(columns) if others is None else None
    return scores if top_k is None else best_of(scores, top_k, largest, left_out)


class _Totals:
    """Sums over targets that come in blocks: of their directions at each checkpoint, or of their scores.

    Args:
        rows: how targets are added up.
    """

    def __init__(self, rows: Sums) -> None:
        self._rows = rows
        self._sums: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []

    def add(self, tensors: Sequence[Tensor], examples: range) -> None:
        """Add tensors with a row for each of some targets."""
        if not self._sums:
            self._sums = [part.new_zeros(self._rows.count, part.shape[1], dtype=torch.float64) for part in tensors]
            self._dtypes = [part.dtype for part in tensors]
        for total, part in zip(self._sums, tensors, strict=True):
            self._rows.add_(total, part, slice(examples.start, examples.stop), 0)

    def tensors(self) -> list[Tensor]:
        """The sums, in the dtypes of what was added."""
        return [total.to(dtype) for total, dtype in zip(self._sums, self._dtypes, strict=True)]


def _numbers_kept(store: FeatureStore, scorer: Scorer, kept: Kept, others: Others | None) -> int:
    """How many numbers the scores of a target take, at most, while they are made."""
    if kept.columns is None and kept.rows is not None and not scorer.linear:
        return store.num_examples if others is None else len(others)
    numbers = store.shard_size + (kept.top_k or 0) * (2 if kept.largest is None else 1)
    return numbers + (0 if kept.columns is None else kept.columns.count)


def _blocks(loader: DataLoader[Any], bytes_each: int, total: int) -> list[range]:
    """Positions of targets, as many whole batches at a time as fit in ``total`` bytes."""
    batch = batch_size_of(loader)
    return chunked(range(num_examples(loader)), batch * max(1, total // (batch * bytes_each)))
