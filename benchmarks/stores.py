"""Features of a task at several models."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.tasks import Task
from benchmarks.truth import trainer_for
from lightning_trak import TRAK
from lightning_trak.projections import Projection
from lightning_trak.store import FeatureStore


def featurize(
    task: Task, states: list[dict[str, Tensor]], projection: Projection, directory: Path
) -> tuple[FeatureStore, list[Tensor]]:
    """The store of the training set, and the features of the targets, (num_targets, k), at each model."""
    module, trainer = task.make_module().eval(), trainer_for(task)
    stores = []
    for name, data in (("train", task.train), ("targets", task.targets)):
        trak = TRAK(module, states, directory / name, output=task.output, projection=projection)
        trak.featurize(trainer, DataLoader(data, batch_size=100))
        manifest = FeatureStore.read_manifest(directory / name)
        stores.append(FeatureStore(directory / name, manifest["identity"], manifest["num_examples"], read_only=True))
    store, targets = stores
    return store, [
        torch.cat([targets.read(checkpoint, shard).features for shard in range(targets.num_shards)])
        for checkpoint in range(len(states))
    ]
