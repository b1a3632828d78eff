"""The two packages of PyTorch Lightning, and the questions that take their classes for the same."""

import ast
from pathlib import Path

import lightning as L
import lightning_fabric
import pytest
import pytorch_lightning as pl
from lightning.fabric.wrappers import _FabricModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from lightning_trak import packages
from lightning_trak.packages import both, is_a, overrides, own
from tests.launch import run_script

PACKAGE = Path(packages.__file__).parent

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


def test_pytorch_lightning_is_not_imported(tmp_path):
    script = tmp_path / "lightning_alone.py"
    script.write_text("""
import sys
import lightning as L
import lightning_trak.methods, lightning_trak.callbacks
from lightning_trak.packages import both
assert "pytorch_lightning" not in sys.modules
assert both(L.Trainer) == (L.Trainer,)
""")
    assert run_script(script) == 0, script.with_suffix(".log").read_text()


def questions_of_one_package(path):
    """Uses of ``isinstance`` and ``is_overridden`` that classes of pytorch_lightning would fail."""
    tree = ast.parse(path.read_text())
    imported = {"L": "lightning"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning."):
            imported |= {alias.asname or alias.name: node.module for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = {part.id for argument in node.args[1:] for part in ast.walk(argument) if isinstance(part, ast.Name)}
            if node.func.id == "is_overridden" or (node.func.id == "isinstance" and names & imported.keys()):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


def test_no_module_asks_for_the_classes_of_one_package():
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "packages.py"]
    found = [question for path in paths for question in questions_of_one_package(path)]
    assert not found, f"use is_a, own and overrides of lightning_trak.packages: {found}"
