"""Snapshots of a LightningModule, for the network that it wraps."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import GradientDot, TracIn, TRAKCallback
from lightning_trak.checkpoints.manifest import ParameterGroup
from lightning_trak.checkpoints.of_model import checkpoints_of
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection
from tests.lit import TARGETS, TRAIN, make_trainer

OPTIONS = {"output": ClassificationMargin(), "projection": IdentityProjection()}


class Wrapping(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(TRAIN.tensors[0].shape[1], 4), nn.ReLU(), nn.Linear(4, 3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]) * self.scale, batch[1])

    def configure_optimizers(self):
        groups = [{"params": self.net.parameters(), "lr": 0.02}, {"params": [self.scale], "lr": 0.1}]
        return torch.optim.Adam(groups)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory, module = tmp_path_factory.mktemp("wrapped") / "snapshots", Wrapping()
    trainer = make_trainer(max_epochs=2, callbacks=[TRAKCallback(directory, preconditioner=True)])
    trainer.fit(module, DataLoader(TRAIN, batch_size=10))
    return module, directory


def test_weights_rates_and_preconditioners_are_those_of_the_network(run):
    module, directory = run
    found = checkpoints_of(module.net, directory)
    assert len(found) == 2
    weights = found[-1].load()
    assert weights.keys() == module.net.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.net.state_dict().items())
    kept = found[-1].load_preconditioner()
    assert kept.keys() == dict(module.net.named_parameters()).keys()
    whole = checkpoints_of(module, directory)[-1]
    assert all(torch.equal(tensor, whole.load_preconditioner()[f"net.{name}"]) for name, tensor in kept.items())


@pytest.mark.slow
def test_scores_are_those_of_the_module_without_its_other_parameters(run, tmp_path):
    module, directory = run
    for number, (kind, options) in enumerate(((TracIn, {}), (GradientDot, {"preconditioned": True}))):
        found, expected = (
            kind(model, directory, tmp_path / f"{number}{name}", **OPTIONS, **options, **more).attribute(
                make_trainer(), TRAIN, TARGETS
            )
            for name, model, more in (("net", module.net, {}), ("whole", module, {"parameters": "net.*"}))
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("parts", "frozen", "match"),
    [
        (("net", "other"), None, r"has several models that fit Linear: net, other; pass the module that was trained"),
        (("net",), "0" * 64, r"leaves out frozen parameters of the module whose net is this Linear; pass the module"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path, parts, frozen, match):
    module = nn.ModuleDict({part: nn.Linear(2, 1) for part in parts})
    names = tuple(name for name, _ in module.named_parameters())
    series = SnapshotSeries(tmp_path)
    series.open()
    series.save(module.state_dict(), 1, 1, [ParameterGroup(0, "SGD", 0.1, 0.0, names)], frozen=frozen)
    series.close()
    with pytest.raises(ValueError, match=match):
        checkpoints_of(module["net"], tmp_path)
