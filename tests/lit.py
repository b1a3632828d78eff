"""A small Lightning model, data for it, and checkpoints of it."""

import copy
import functools
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, AttributionMixin
from lightning_trak.features import FeatureStore
from lightning_trak.methods import FeatureMethod
from lightning_trak.outputs import ClassificationMargin, ModelOutput
from lightning_trak.projections import SparseProjection
from lightning_trak.storage.files import load_metadata


class LitNet(AttributionMixin, L.LightningModule):
    """Has what can go wrong in a copy: batch statistics, dropout, a buffer that is not saved, a tied weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.norm(self.first(inputs))))) * self.scale

    def configure_model_output(self) -> ModelOutput:
        return ClassificationMargin()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-3)


def make_data(size: int, seed: int = 0) -> TensorDataset:
    """Three overlapping clusters in six dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (size,), generator=generator)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    return TensorDataset(centres[labels] + torch.randn(size, 6, generator=generator), labels)


def make_model(seed: int = 0, steps: int = 30) -> LitNet:
    """A net trained for some steps in plain torch."""
    return copy.deepcopy(_trained(seed, steps))


@functools.cache
def _trained(seed: int, steps: int) -> LitNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LitNet()
        inputs, labels = make_data(64).tensors
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    model.zero_grad()
    return model


def make_checkpoints(count: int) -> list[dict[str, Tensor]]:
    """State dicts of independently trained nets."""
    return [make_model(seed=seed + 1).state_dict() for seed in range(count)]


def make_trainer(**options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(quiet | options))


TRAIN, TARGETS = make_data(50), make_data(13, seed=1)


class ScaledData(L.LightningDataModule):
    """These data, with a batch transfer hook of its own."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TRAIN, batch_size=16)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TARGETS, batch_size=16)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 3, batch[1]


def attribute(
    tmp_path: Path,
    checkpoints: list[dict[str, Tensor]],
    train: Any = TRAIN,
    targets: Any = TARGETS,
    trainer: L.Trainer | None = None,
    name: str = "store",
    score: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Scores by the whole pipeline, with a small projection."""
    trak = TRAK(make_model(), checkpoints, tmp_path / name, projection=SparseProjection(32), **options)
    trainer = trainer or make_trainer()
    trak.featurize(trainer, train)
    return trak.score(trainer, targets, **(score or {}))


class OwnLinear(nn.Linear):
    """A type that no layer class of the hooks covers."""


def beyond_hooks(module):
    """Give the linear layers a type of their own, so that engine="auto" takes vmap."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = OwnLinear
    return module


def stored(directory: Path) -> FeatureStore:
    """A store with all its checkpoints, by the names of their folders, to be looked into."""
    files = [min(folder.glob("shard-*")) for folder in sorted(Path(directory).glob("checkpoint-*"))]
    identity = FeatureStore.read_manifest(directory)["identity"]
    return FeatureStore(
        directory,
        identity | {"checkpoints": [load_metadata(file)["checkpoint"] for file in files]},
        None,
        read_only=True,
    )


def open_store(method: FeatureMethod, trainer: L.Trainer | None = None) -> FeatureStore:
    """The store of a method, to be looked into."""
    pipeline = method._pipeline()
    return pipeline.open(pipeline.copy_model(), trainer)
