"""Selected parameters that no optimizer had are warned of."""

import warnings

import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK, TRAKCallback
from lightning_trak.methods import Explicit, InfluenceFunction
from lightning_trak.projections import IdentityProjection
from tests.lit import TRAIN, LitNet, make_trainer


class HeadOnly(LitNet):
    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def trained(module, directory):
    """A directory with one snapshot of a short training."""
    trainer = make_trainer(callbacks=[TRAKCallback(directory)], max_epochs=1, limit_train_batches=1)
    trainer.fit(module, DataLoader(TRAIN, batch_size=8))
    return directory


def found(method, data=TRAIN):
    """The warnings about parameters that were not trained."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        method.attribute(make_trainer(), data, data)
    return [str(item.message) for item in given if "no optimizer had" in str(item.message)]


def test_parameters_that_no_optimizer_had_are_named_once(tmp_path):
    module, snapshots = HeadOnly(), trained(HeadOnly(), tmp_path / "snapshots")
    (message,) = found(TRAK(module, snapshots, tmp_path / "all", projection=IdentityProjection()))
    assert "had 4 of 6 selected parameters" in message
    assert "first.weight, first.bias, norm.weight and 1 more" in message
    assert len(found(InfluenceFunction(module, snapshots, solver=Explicit(), damping=1.0))) == 1
    assert found(TRAK(module, snapshots, tmp_path / "head", projection=IdentityProjection(), parameters="head.*")) == []


def test_nothing_is_said_where_all_were_trained_or_it_is_not_known(tmp_path):
    some, every = trained(HeadOnly(), tmp_path / "head"), trained(LitNet(), tmp_path / "every")
    both = [some, every]  # thawed later
    assert found(TRAK(LitNet(), both, tmp_path / "thawed", projection=IdentityProjection())) == []
    file = next(some.glob("*.safetensors"))
    assert found(TRAK(LitNet(), [file], tmp_path / "file", projection=IdentityProjection())) == []
