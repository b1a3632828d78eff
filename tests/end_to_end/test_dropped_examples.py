"""Collate functions that leave examples out, so that rows would not belong to positions in the dataset."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_trak import TRAK, GradientDot, Metagradient, TrainingRecorder
from lightning_trak.methods import EKFACInfluence, RepresentationSimilarity, TrainingLoss
from lightning_trak.projections import SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_model, make_trainer

REFUSAL = "scores belong to positions in the dataset, so the collate function must not leave examples out"


class WithHoles(Dataset):
    def __init__(self, data, holes):
        self.data, self.holes = data, holes

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return None if index in self.holes else self.data[index]


def drop(items):
    return default_collate([item for item in items if item is not None])


def first(items):
    return default_collate(items[:1])


def with_holes(data, *holes):
    return DataLoader(WithHoles(data, holes), batch_size=5, collate_fn=drop)


def make_trak(store):
    return TRAK(make_model(), store=store, projection=SparseProjection(8))


@pytest.mark.parametrize("holes", [(3,), (0,), (49,), range(10, 20)], ids=["inside", "first", "last", "whole batches"])
def test_training_examples(holes, tmp_path):
    with pytest.raises(ValueError, match=REFUSAL):
        make_trak(tmp_path).featurize(make_trainer(), with_holes(TRAIN, *holes))


@pytest.mark.parametrize("hole", [0, 3, 12])
def test_targets(hole, tmp_path):
    trak = make_trak(tmp_path)
    trak.featurize(make_trainer(), TRAIN)
    with pytest.raises(ValueError, match=REFUSAL):
        trak.score(make_trainer(), with_holes(TARGETS, hole))
    with pytest.raises(ValueError, match=REFUSAL):
        make_trainer().predict(trak.scorer(), with_holes(TARGETS, hole))


def test_a_function_that_takes_one_example(tmp_path):
    """It is right with a batch size of 1 alone."""
    with pytest.raises(ValueError, match=f"first makes the same batch of two examples as of three: {REFUSAL}"):
        make_trak(tmp_path).featurize(make_trainer(), DataLoader(TRAIN, batch_size=5, collate_fn=first))

    def scores(name, **options):
        method = GradientDot(make_model(), store=tmp_path / name, projection=SparseProjection(8))
        method.featurize(make_trainer(), DataLoader(TRAIN, **options))
        return method.score(make_trainer(), DataLoader(TARGETS, **options))

    torch.testing.assert_close(scores("one", collate_fn=first), scores("all", batch_size=10))


@pytest.mark.parametrize("method", [RepresentationSimilarity, EKFACInfluence])
@pytest.mark.filterwarnings("ignore:EK-FAC leaves out")
def test_other_methods(method):
    with pytest.raises(ValueError, match=REFUSAL):
        method(make_model()).attribute(make_trainer(), with_holes(TRAIN, 3), TARGETS)


def test_losses():
    with pytest.raises(ValueError, match=REFUSAL):
        TrainingLoss(make_model()).label_suspicion(make_trainer(), with_holes(TRAIN, 3))


def test_recorded_training(tmp_path):
    model = LitNet()
    model.norm = torch.nn.Identity()
    train = with_holes(TRAIN, 3)
    make_trainer(max_epochs=1, callbacks=[TrainingRecorder(tmp_path)]).fit(model, train)
    with pytest.raises(ValueError, match=REFUSAL):
        Metagradient(model, tmp_path, progress_bar=False).attribute(make_trainer(), train, TARGETS)
