"""Prints fingerprints of modules and outputs, for another process to compare: a script, and a module to import."""

import enum
import functools
import json
import sys
from dataclasses import dataclass, field

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trak.fingerprints import module_fingerprint
from lightning_trak.outputs import ClassificationMargin, ModelOutput, NegativeLoss

SCALES = {"first", "second", "third"}


class Mode(enum.Enum):
    SUM = 1
    MEAN = 2


@dataclass
class Config:
    width: int = 3
    kinds: set = field(default_factory=lambda: {"a", "b", "c", "d"})


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


class Net(L.LightningModule):
    """Calls itself, keeps counts, and holds a bit of everything."""

    mode = Mode.MEAN

    def __init__(self):
        super().__init__()
        self.config = Config()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.5))
        self.act = F.gelu
        self.calls, self.cache, self.last = 0, {}, None
        self.head = nn.Linear(4, 3)

    def forward(self, inputs):
        self.calls += 1
        self.cache[self.calls] = self.last = inputs
        hidden = self.act(self.body(inputs)) * self.config.width
        if even(4) and self.mode is Mode.MEAN and SCALES and self.config.kinds:
            hidden = hidden / 2
        return self.head(hidden)

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Output(ModelOutput):
    def __init__(self):
        self.kinds = frozenset(SCALES)
        self.reduce = functools.partial(torch.mean, dim=1)

    def output(self, module, batch):
        return self.reduce(module(batch[0])) * len(self.kinds)

    def loss(self, output):
        return F.softplus(-output)


def fingerprints():
    outputs = [Output(), ClassificationMargin(), NegativeLoss(lambda m, b: even(len(b)))]
    return [module_fingerprint(Net(), outputs[0]), *(output.fingerprint() for output in outputs)]


if __name__ == "__main__":
    json.dump(fingerprints(), sys.stdout)
