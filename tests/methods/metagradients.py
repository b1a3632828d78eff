"""Runs, layers and optimizers for the tests of metagradients, and finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_trak import AttributionMixin, Metagradient
from lightning_trak.outputs import ModelOutput, RegressionOutput
from lightning_trak.replay import SmoothAdamW
from tests.replay.runs import NUM_TRAIN, Net, make_data, train

DATA, TARGETS = make_data(), make_data(3, seed=5)
DIRECTION = torch.randn(NUM_TRAIN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
STEP = 1e-4


def outputs(module: Net, targets: TensorDataset = TARGETS) -> Tensor:
    batch = [part.double() if part.is_floating_point() else part for part in targets.tensors]
    module = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        return module.configure_model_output().output(module, batch)


def attribute(module: Any, directory: Path, trainer: L.Trainer, targets: Any = TARGETS, **options: Any) -> Tensor:
    options = {"check_smooth": False, "progress_bar": False} | options
    return Metagradient(module, directory, **options).attribute(trainer, DATA, targets)


def require_derivative(
    make: Callable[[], Net], scores: Tensor, options: dict[str, Any], targets: TensorDataset = TARGETS
) -> None:
    """Compare the scores, along one direction of weights, with central differences of fourth order."""

    def at(distance: float) -> Tensor:
        module = make()
        module.weights = 1 + distance * STEP * DIRECTION
        train(module, DATA, **options)
        return outputs(module, targets)

    expected = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)
    assert expected.norm() > 1e-3
    assert (scores @ DIRECTION - expected).norm() < 1e-7 * expected.norm()


class Linear(AttributionMixin, L.LightningModule):
    """Linear regression by gradient descent."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.net.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]).squeeze(-1), batch[1]) / 2

    def configure_model_output(self) -> ModelOutput:
        return RegressionOutput()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def layers(*inner: nn.Module, width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), *inner, nn.Tanh(), nn.Linear(width, 3))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        images = self.norm(self.conv(inputs.reshape(-1, 1, 2, 2)))
        return self.head(F.max_pool2d(F.gelu(images), 2).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 3)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(inputs.reshape(-1, 4, 1))).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs.reshape(-1, 2, 2))[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs).tanh()).tanh())


class Padded(nn.Module):
    """Mean embeddings. The row of the padding counts, but has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(2, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.embed((inputs > 0).long()).mean(1).tanh())


NETS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: layers(nn.Dropout(0.3)),
    "batch norm": lambda: layers(nn.BatchNorm1d(6)),
    "layer norm": lambda: layers(nn.LayerNorm(6)),
    "group norm": lambda: layers(nn.GroupNorm(2, 6)),
    "square group norm": lambda: layers(nn.GroupNorm(4, 16), width=16),
    "convolutions": Convolutional,
    "attention": Attention,
    "recurrent": Recurrent,
    "tied, frozen and unused weights": Tied,
    "padding": Padded,
}


def sgd(**options: Any) -> Callable[[Net], Any]:
    return lambda module: torch.optim.SGD(module.parameters(), **({"lr": 0.1} | options))


def adam(kind: Any, **options: Any) -> Callable[[Net], Any]:
    return lambda module: kind(module.parameters(), lr=0.01, **options)


def groups(module: Net) -> Any:
    *body, weight, bias = module.parameters()
    groups = [{"params": body, "weight_decay": 0.1}, {"params": [bias, weight], "lr": 0.03, "momentum": 0.5}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def scheduled(module: Net) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=6)  # momentum changes, too
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def paused(module: Net) -> Any:
    """The third step is without momentum."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=6, pct_start=0.5, base_momentum=0.0, max_momentum=0.9
    )
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


OPTIMIZERS: dict[str, Callable[[Net], Any]] = {
    "sgd": sgd(),
    "momentum": sgd(momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": sgd(momentum=0.9, maximize=True),
    "adam": adam(torch.optim.Adam, weight_decay=0.01),
    "amsgrad": adam(torch.optim.Adam, amsgrad=True, betas=(0.8, 0.7)),
    "adamw": adam(torch.optim.AdamW, weight_decay=0.1, maximize=True),
    "smooth adamw": adam(SmoothAdamW, eps_root=1e-4, weight_decay=0.1),
    "groups": groups,
    "schedule": scheduled,
    "paused momentum": paused,
}
