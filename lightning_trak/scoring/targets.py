"""Scores of whole datasets of targets, in blocks that fit in memory."""

from collections.abc import Iterator
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.features.model import ModelCopy
from lightning_trak.features.pipeline import FeaturePipeline
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.loading import batch_size_of
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.base import Scorer, Scores
from lightning_trak.scoring.topk import TopK

# Targets are scored in blocks whose features take this much memory; a few copies of them are made on the way.
TARGET_BYTES = 1 << 28


def score_targets(
    trainer: L.Trainer,
    loader: DataLoader[Any],
    pipeline: FeaturePipeline,
    model: ModelCopy,
    store: FeatureStore,
    scorer: Scorer,
    datamodule: L.LightningDataModule | None,
    top_k: int | None,
    largest: bool,
) -> Scores:
    """Score the examples of a dataset against every stored example.

    Args:
        trainer: what runs.
        loader: whose dataset the targets are in.
        pipeline: makes their features.
        model: what the pipeline's ``copy_model`` gave.
        store: what its ``open_complete`` gave.
        scorer: what scores.
        datamodule: where the loader came from, if it has batch transfer hooks of its own.
        top_k: keep only this many training examples for each target.
        largest: whether ``top_k`` keeps the highest scores or the lowest.

    Returns:
        On every rank a CPU Tensor ``(num_targets, num_train)``, or a TopK.
    """
    numbers = max(store.read_stored(0, 0).k * store.num_checkpoints, store.shard_size + (top_k or 0))
    blocks = _blocks(loader, numbers * max(4, pipeline.settings.dtype.floating.itemsize))
    parts: list[Scores] = []
    for features in pipeline.target_features(trainer, loader, blocks, model, store, datamodule):
        scorer.fit(trainer.strategy.root_device, Ranks.of(trainer))
        directions = [scorer.directions(checkpoint, rows) for checkpoint, rows in enumerate(features)]
        parts.append(scorer.score(directions, top_k, largest, Ranks.of(trainer)))
    if isinstance(parts[0], TopK):
        return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return torch.cat(cast(list[Tensor], parts))


def _blocks(loader: DataLoader[Any], bytes_each: int) -> Iterator[range]:
    """Positions of targets, as many whole batches at a time as fit in memory."""
    total, batch = len(cast(Any, loader.dataset)), batch_size_of(loader)
    step = batch * max(1, TARGET_BYTES // (batch * bytes_each))
    return (range(start, min(start + step, total)) for start in range(0, total, step))
