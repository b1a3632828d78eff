"""The two packages of PyTorch Lightning, and the questions that take their classes for the same."""

import subprocess
import sys

import lightning as L
import lightning_fabric
import pytest
import pytorch_lightning as pl
from lightning.fabric.wrappers import _FabricModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from lightning_trak.packages import both, is_a, overrides, own

TWINS = [
    (L.LightningModule, pl.LightningModule),
    (L.LightningDataModule, pl.LightningDataModule),
    (L.Trainer, pl.Trainer),
    (CSVLogger, pl.loggers.CSVLogger),
    (FSDPStrategy, pl.strategies.FSDPStrategy),
    (_FabricModule, lightning_fabric.wrappers._FabricModule),
]


@pytest.mark.parametrize(("kind", "twin"), TWINS, ids=lambda kind: kind.__name__)
def test_twins_are_found(kind, twin):
    assert both(kind) == (kind, twin)
    assert kind is not twin


def test_other_classes_have_no_twin():
    assert both(nn.Linear) == (nn.Linear,)


def test_kinds_of_both_packages():
    for module in (L.LightningModule(), pl.LightningModule()):
        assert is_a(module, L.LightningModule)
        assert is_a(module, L.Trainer, L.LightningModule)
        assert not is_a(module, L.Trainer)
        assert own(L.LightningModule, module) in type(module).__mro__
        assert own(L.Trainer, module).__module__.partition(".")[0] == type(module).__module__.partition(".")[0]
    assert not is_a(nn.Linear(1, 1), L.LightningModule)
    assert own(L.LightningModule, nn.Linear(1, 1)) is L.LightningModule
    assert is_a(pl.strategies.DDPStrategy(), DDPStrategy)
    assert not is_a(pl.strategies.DDPStrategy(), FSDPStrategy)


@pytest.mark.parametrize("package", [L, pl])
def test_what_a_class_overrides(package):
    class Data(package.LightningDataModule):
        def prepare_data(self):
            pass

    assert overrides(Data(), "prepare_data", L.LightningDataModule)
    assert not overrides(Data(), "train_dataloader", L.LightningDataModule)


def test_pytorch_lightning_is_not_imported():
    code = """
import sys
import lightning as L
import lightning_trak.methods, lightning_trak.callbacks
from lightning_trak.packages import both
assert "pytorch_lightning" not in sys.modules
assert both(L.Trainer) == (L.Trainer,)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
