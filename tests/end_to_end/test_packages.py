"""Both packages of PyTorch Lightning, from training to a metric, and models that Fabric has set up."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import TRAK, AttributionMixin, LinearDatamodelingScore, Metagradient, TrainingRecorder, TRAKCallback
from lightning_trak.callbacks import SmoothTwin
from lightning_trak.methods import RepresentationSimilarity
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.loggers import log_lds
from lightning_trak.retraining import RetrainingFleet, random_subsets
from tests.lit import LitNet, make_data, make_model

TRAIN, TARGETS = make_data(24), make_data(6, seed=1)
PACKAGES = {"lightning": L, "pytorch_lightning": pl}
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def classes(package: Any) -> tuple[Any, Any]:
    """A module and a data module of a package. Their hooks use the Trainer."""

    class Net(AttributionMixin, package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, inputs: Any) -> Any:
            return self.head(self.body(inputs).tanh())

        def configure_model_output(self) -> Any:
            return ClassificationMargin()

        def training_step(self, batch: Any) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(package.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.train, self.targets = TRAIN, TARGETS

        def train_dataloader(self) -> Any:
            return DataLoader(self.train, batch_size=8)

        def predict_dataloader(self) -> Any:
            return DataLoader(self.targets, batch_size=4)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert self.trainer.world_size == 1
            return [batch[0] * 0.5, batch[1]]

    return Net, Data


def trainer_of(package: Any, **options: Any) -> Any:
    return package.Trainer(**(QUIET | {"logger": False, "max_epochs": 2} | options))


def make_net(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind()


def attribute(net: Any, trainer: Any, data: Any, root: Any, name: str = "features") -> torch.Tensor:
    trak = TRAK(net, root / "snapshots", root / name, projection=SparseProjection(16))
    trak.featurize(trainer, data)
    return trak.score(trainer, data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each package: the trained module, its Trainer, its data and directory."""
    found = {}
    for name, package in PACKAGES.items():
        root = tmp_path_factory.mktemp(name)
        kind, data_kind = classes(package)
        callbacks = [SmoothTwin(0.5), TRAKCallback(root / "snapshots"), TrainingRecorder(root / "recording")]
        trainer, net, data = trainer_of(package, callbacks=callbacks), make_net(kind), data_kind()
        trainer.fit(net, data)
        found[name] = (net, trainer, data, root)
    return found


def test_both_packages_give_the_same(runs: dict[str, Any], tmp_path: Any) -> None:
    found, lds = {}, {}
    for name, (net, trainer, data, root) in runs.items():
        scores = attribute(net, trainer, data, root)
        recorded = Metagradient(net, root / "recording").attribute(trainer, data, data)
        similar = RepresentationSimilarity(net, root / "snapshots", layer="body").attribute(trainer, data, data)
        metric = LinearDatamodelingScore(torch.rand(5, 24, generator=torch.Generator().manual_seed(0)) > 0.5)
        metric.update(scores, torch.randn(6, 5, generator=torch.Generator().manual_seed(1)))
        logger = PACKAGES[name].pytorch.loggers if name == "lightning" else pl.loggers
        log_lds([logger.CSVLogger(tmp_path / name)], metric, name="TRAK")
        found[name], lds[name] = (scores, recorded, similar), metric.compute()
    assert all(map(torch.equal, *found.values()))
    assert torch.equal(*lds.values())
    pictures = [sorted(path.name for path in (tmp_path / name).rglob("*.*")) for name in PACKAGES]
    assert pictures[0] == pictures[1]
    assert any(picture.endswith(".png") for picture in pictures[0])


def test_a_module_of_one_package_in_a_trainer_of_the_other(runs: dict[str, Any]) -> None:
    for model, other in (("lightning", pl), ("pytorch_lightning", L)):
        net, trainer, data, root = runs[model]
        found = attribute(net, trainer_of(other), data, root, "mixed")
        assert torch.equal(found, attribute(net, trainer, data, root))
        assert isinstance(net.trainer, PACKAGES[model].Trainer)

        class Halves(type(net)):  # its hook needs the Trainer
            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return [batch[0] / (2 * self.trainer.world_size), batch[1]]

        halves = TRAK(Halves(), root / "snapshots", root / "halves", projection=SparseProjection(16))
        halves.featurize(trainer_of(other), TRAIN)
        torch.testing.assert_close(halves.score(trainer_of(other), TARGETS), found)  # the data module halves them, too


@pytest.mark.parametrize("name", PACKAGES)
def test_the_scorer_is_a_module_of_the_models_package(name: str, runs: dict[str, Any]) -> None:
    net, trainer, data, root = runs[name]
    expected = attribute(net, trainer, data, root)
    trak = TRAK(net, root / "snapshots", root / "features", projection=SparseProjection(16))
    scorer = trak.scorer()
    assert isinstance(scorer, PACKAGES[name].LightningModule)
    batches = trainer.predict(scorer, data)
    torch.testing.assert_close(torch.cat(batches), expected)


@pytest.mark.parametrize("name", PACKAGES)
def test_fleets_of_both_packages(name: str, tmp_path: Any) -> None:
    kind, _ = classes(PACKAGES[name])
    fleet = RetrainingFleet(
        tmp_path, kind, lambda: trainer_of(PACKAGES[name]), DataLoader(TRAIN, batch_size=8, shuffle=True), TARGETS,
        random_subsets(24, 2),
    )  # fmt: skip
    fleet.run()
    assert fleet.outputs.shape[:2] == (6, 2)


def fabric_model(kind: str, net: Any) -> Any:
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model, optimizer = fabric.setup(torch.compile(net, backend="eager") if kind != "plain" else net, optimizer)
    for batch in DataLoader(TRAIN, batch_size=8):
        optimizer.zero_grad()
        fabric.backward(model.training_step(batch))
        optimizer.step()
    return torch.compile(model, backend="eager") if kind == "both" else model


@pytest.mark.parametrize(
    "kind", ["plain", pytest.param("compiled", marks=pytest.mark.slow), pytest.param("both", marks=pytest.mark.slow)]
)
def test_a_model_that_fabric_has_set_up(kind: str, tmp_path: Any) -> None:
    model = fabric_model(kind, make_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(L)

    def scores(net: Any, name: str, **options: Any) -> torch.Tensor:
        trak = TRAK(net, before, tmp_path / name, projection=SparseProjection(16), **options)
        trak.featurize(trainer, TRAIN)
        return trak.score(trainer, TARGETS)

    found = scores(model, "features")
    own = LitNet()
    assert torch.equal(found, scores(own, "features"))  # the same store
    assert torch.equal(found, scores(own, "others"))
    head = scores(model, "head", parameters="head.*")
    assert torch.equal(head, scores(own, "own head", parameters=["head.weight", "head.bias"]))
    assert not torch.allclose(head, found)
    model.train()
    model(TRAIN[0:8][0])  # Fabric's model still works
    assert all(parameter.grad is not None for parameter in model.parameters())
