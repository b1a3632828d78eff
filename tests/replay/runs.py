"""Tiny recorded runs in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import AttributionMixin, TrainingRecorder
from lightning_trak.outputs import ClassificationMargin, ModelOutput
from tests.callback_nets import make_trainer

NUM_TRAIN, CLASSES = 12, 3


class Net(AttributionMixin, L.LightningModule):
    """A classifier. Its layers and its optimizer are given; it weighs examples for finite differences."""

    def __init__(
        self,
        net: Callable[[], nn.Module] | None = None,
        optimizer: Callable[[Net], Any] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net() if net else nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        self.make_optimizer = optimizer or (lambda module: torch.optim.SGD(module.parameters(), lr=0.2))
        self.weights: Tensor | None = None  # of all examples, for retraining

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch[:2]
        losses = F.cross_entropy(self(inputs), labels, reduction="none")
        if self.weights is not None:
            losses = losses * self.weights.to(losses.device)[batch[2]]
        return losses.mean()

    def configure_model_output(self) -> ModelOutput:
        return ClassificationMargin(labels_key=1, forward=lambda module, batch: module(batch[0]))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


class Thaw(BaseFinetuning):
    """The first layer is trained from the second epoch on."""

    def freeze_before_training(self, module: L.LightningModule) -> None:
        self.freeze(module.net[0])

    def finetune_function(self, module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.05)


class ThawAndFreeze(Thaw):
    """Of the last layer, then only the bias is trained."""

    def finetune_function(self, module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        super().finetune_function(module, epoch, optimizer)
        if epoch == 1:
            self.freeze(module.net[2])
            module.net[2].bias.requires_grad_(True)


def sgd_of_trained(module: L.LightningModule) -> torch.optim.SGD:
    """SGD for the parameters that are trained from the first epoch on."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def make_data(size: int = NUM_TRAIN, seed: int = 0, shape: tuple[int, ...] = (4,)) -> TensorDataset:
    """Inputs, labels and positions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return TensorDataset(torch.randn(size, *shape, generator=generator), labels, torch.arange(size))


def shuffled(data: Any, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=batch_size, shuffle=True, **options)


def train(
    module: L.LightningModule,
    data: Any,
    directory: Path | None = None,
    spacing: Any = "sqrt",
    loader: Callable[[Any], DataLoader[Any]] = shuffled,
    callbacks: Any = (),
    ckpt_path: Any = None,
    **options: Any,
) -> L.Trainer:
    """Fit a module with fixed seeds, and record the run if there is a directory."""
    recorder = [] if directory is None else [TrainingRecorder(directory, spacing)]
    trainer = make_trainer(*recorder, *callbacks, **({"precision": "64-true", "max_epochs": 2} | options))
    torch.manual_seed(1)
    trainer.fit(module, loader(data), ckpt_path=ckpt_path)
    return trainer
