"""Data with random augmentation: refused where they are loaded several times, and noticed elsewhere."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_trak import TRAK, Metagradient, TrainingRecorder
from lightning_trak.methods import (
    EKFACInfluence,
    ExactKernel,
    Explicit,
    InfluenceFunction,
    RepresentationSimilarity,
    TrainingLoss,
)
from lightning_trak.projections import SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_trainer


class Augmented(Dataset):
    """Items from a position on are others each time."""

    def __init__(self, data=TRAIN, start=0):
        self.data, self.start = data, start

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, label = self.data[index]
        return (inputs + torch.randn_like(inputs) if index >= self.start else inputs), label


class AugmentsBatches(LitNet):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + torch.randn_like(batch[0]), batch[1]]


class AugmentsInTraining(AugmentsBatches):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return super().on_after_batch_transfer(batch, dataloader_idx) if self.trainer.training else batch


CASES = {"dataset": (LitNet, Augmented()), "hook": (AugmentsBatches, TRAIN)}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("method", [lambda model: InfluenceFunction(model, solver=Explicit()), EKFACInfluence])
def test_influence_functions_refuse_them(method, kind):
    """Each pass of a solver would see another Hessian."""
    model, data = CASES[kind]
    with pytest.raises(ValueError, match="examples are not the same twice, perhaps because of random augmentation"):
        method(model()).attribute(make_trainer(), DataLoader(data, batch_size=10), TARGETS)


def test_targets_count_too():
    with pytest.raises(ValueError, match="examples are not the same twice"):
        InfluenceFunction(LitNet(), solver=Explicit()).attribute(make_trainer(), TRAIN, Augmented())


@pytest.mark.parametrize("kind", CASES)
def test_losses_say_so(kind):
    model, data = CASES[kind]
    with pytest.warns(UserWarning, match="of example .* is not the same twice, perhaps because of random augmentation"):
        TrainingLoss(model()).label_suspicion(make_trainer(), data)


def test_a_hook_that_augments_is_refused_before_any_shard(tmp_path):
    trak = TRAK(AugmentsBatches(), store=tmp_path, projection=SparseProjection(8))
    with pytest.raises(ValueError, match="a batch transfer hook, such as on_after_batch_transfer, draws random"):
        trak.featurize(make_trainer(), TRAIN)
    assert not list(tmp_path.rglob("shard-*"))


def test_a_hook_that_augments_in_training_is_right(tmp_path):
    def scores(model, name):
        torch.manual_seed(0)
        trak = TRAK(model(), store=tmp_path / name, projection=SparseProjection(8))
        trak.featurize(make_trainer(), TRAIN)
        return trak.score(make_trainer(), TARGETS)

    assert torch.equal(scores(AugmentsInTraining, "hook"), scores(LitNet, "plain"))


TARGETS_DIFFER = "of (the data to score|the targets|example .*) (are|is) not the same twice"


@pytest.mark.parametrize("start", [0, 7])
def test_targets_of_stored_features_say_so(start, tmp_path):
    trak = TRAK(LitNet(), store=tmp_path, projection=SparseProjection(8))
    trak.featurize(make_trainer(), TRAIN)
    augmented = DataLoader(Augmented(TARGETS, start), batch_size=5)
    with pytest.warns(UserWarning, match=TARGETS_DIFFER):
        trak.score(make_trainer(), augmented)
    with pytest.warns(UserWarning, match=TARGETS_DIFFER):
        make_trainer().predict(trak.scorer(), augmented)
    with pytest.warns(UserWarning, match=TARGETS_DIFFER):
        trak.score(make_trainer(), TARGETS, train=Augmented())


@pytest.mark.parametrize("method", [RepresentationSimilarity, ExactKernel])
def test_targets_of_other_methods_say_so(method, tmp_path):
    options = {"store": tmp_path} if method is ExactKernel else {}
    with pytest.warns(UserWarning, match=TARGETS_DIFFER):
        method(LitNet(), **options).attribute(make_trainer(), TRAIN, Augmented(TARGETS))


def test_targets_of_a_recorded_run_say_so(tmp_path):
    model = LitNet()
    model.norm = torch.nn.Identity()
    train = DataLoader(TRAIN, batch_size=25)
    make_trainer(max_epochs=1, callbacks=[TrainingRecorder(tmp_path)]).fit(model, train)
    with pytest.warns(UserWarning, match=TARGETS_DIFFER):
        Metagradient(model, tmp_path, progress_bar=False).attribute(make_trainer(), train, Augmented(TARGETS))
