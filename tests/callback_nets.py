"""A Lightning module for the tests of TRAKCallback, and short cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak.checkpoints.series import SnapshotSeries

BATCHES = 4  # of an epoch


class Net(L.LightningModule):
    """Has a tied weight, a weight with strides of its own, and buffers that change while training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(3, 2)
        self.head.weight = nn.Parameter(torch.randn(3, 2).T)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(self.norm(self.encode(x)).relu()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).pow(2).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        biases = [parameter for name, parameter in self.named_parameters() if name.endswith("bias")]
        weights = [parameter for name, parameter in self.named_parameters() if not name.endswith("bias")]
        groups = [{"params": weights, "weight_decay": 0.01}, {"params": biases, "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self(batch[0]).pow(2).mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.encode.parameters(), lr=0.1), torch.optim.Rprop(self.head.parameters(), lr=0.2)]


class History(Callback):
    """The true weights after each optimizer step; of gradient accumulation's batches, the first of a step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        copied = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self.weights.setdefault(trainer.global_step, copied)


def loader() -> DataLoader[Any]:
    data = torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data), batch_size=4)


def make_trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(devices=1, callbacks=list(callbacks), **(quiet | {"max_epochs": 3} | options))


def fit(*callbacks: Callback, module: L.LightningModule | None = None, **options: Any) -> L.Trainer:
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module or Net(), loader(), loader())
    return trainer


def steps(directory: str | Path) -> list[int]:
    return [snapshot.step for snapshot in SnapshotSeries(directory).read().snapshots]


def epochs(directory: str | Path) -> list[int]:
    return [snapshot.epoch for snapshot in SnapshotSeries(directory).read().snapshots]
