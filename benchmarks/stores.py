"""Features of a task at several models."""

from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.tasks import Task
from benchmarks.truth import trainer_for
from lightning_trak import TRAK
from lightning_trak.features.store import FeatureStore
from lightning_trak.projections import Projection


def featurize(
    task: Task, states: list[dict[str, Tensor]], projection: Projection, directory: Path
) -> tuple[FeatureStore, list[Tensor]]:
    """The store of the training set, and the features of the targets, (num_targets, k), at each model."""
    module, trainer = task.make_module().eval(), trainer_for(task)
    trak = TRAK(module, states, directory, output=task.output, projection=projection)
    trak.featurize(trainer, DataLoader(task.train, batch_size=100))
    pipeline = trak._pipeline()
    store = pipeline.open_complete(pipeline.copy_model(trainer), trainer)
    targets = trak.target_features(trainer, DataLoader(task.targets, batch_size=100))
    return store, [found.features for found in targets]
