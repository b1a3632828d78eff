"""What a store remembers of the training data can be lost, and is made again as it was, or not at all."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.features.model import ModelCopy
from lightning_trak.outputs import ClassificationMargin, ContrastiveMargin
from lightning_trak.projections import KroneckerProjection, PrincipalProjection, SparseProjection
from tests.lit import make_trainer, open_store


class Pairs(torch.nn.Module):
    """Embeds pairs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)

    def forward(self, first, second):
        return self.first(first), self.second(second)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def contrastive(directory):
    torch.manual_seed(0)
    model, other = Pairs(), Pairs()
    train, targets = (TensorDataset(draw(count, 6, seed=count), draw(count, 6, seed=-count)) for count in (24, 5))
    weights = [model.state_dict(), other.state_dict()]
    options = {"output": ContrastiveMargin(context_size=8), "projection": SparseProjection(16), "damping": 0.1}
    return "context", TRAK(model, weights, directory, **options), train, targets


def principal_axes(directory):
    return learned(directory, KroneckerProjection(2, 4, axes="principal", sample=16))


def principal_features(directory):
    return learned(directory, PrincipalProjection(6, landmarks=8, sample=16, sketch=16))


def learned(directory, projection):
    torch.manual_seed(0)
    model, other = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
    train, targets = (
        TensorDataset(draw(count, 8, seed=count), (draw(count, 3, seed=-count)).argmax(1)) for count in (24, 5)
    )
    weights = [model.state_dict(), other.state_dict()]
    options = {
        "output": ClassificationMargin(),
        "projection": projection,
        "damping": 0.1,
    }
    return "projection", TRAK(model, weights, directory, **options), train, targets


def lose(path):
    path.unlink()


def damage(path):
    path.write_bytes(path.read_bytes()[:-3] + b"???")


@pytest.fixture(params=[contrastive, principal_axes, principal_features])
def complete(request, tmp_path):
    name, trak, train, targets = request.param(tmp_path)
    train, targets = DataLoader(train, batch_size=4), DataLoader(targets, batch_size=4)
    trak.featurize(make_trainer(), train, shard_size=8)
    scores = trak.score(make_trainer(), targets)
    path = open_store(trak, make_trainer())._path(1, name)
    return path, trak, train, targets, scores


def contents(trak):
    return {path: path.read_bytes() for path in trak.store.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*counts as lost")
@pytest.mark.parametrize("change", [lose, damage])
def test_it_is_made_again_from_the_training_data(complete, change):
    path, trak, train, targets, scores = complete
    before = contents(trak)
    change(path)
    with pytest.raises(RuntimeError, match=rf"has lost the {path.stem} of checkpoint 1, .* call featurize again"):
        trak.score(make_trainer(), targets)
    trak.featurize(make_trainer(), train)
    assert contents(trak) == before
    assert torch.equal(trak.score(make_trainer(), targets), scores)


def test_it_is_made_again_when_shards_are_missing_too(complete):
    path, trak, train, targets, scores = complete
    before = contents(trak)
    path.unlink()
    (path.parent / "shard-00000.safetensors").unlink()
    (path.parent / "shard-00002.safetensors").unlink()
    trak.featurize(make_trainer(), train)
    assert contents(trak) == before
    assert torch.equal(trak.score(make_trainer(), targets), scores)


def test_another_one_than_the_features_were_made_with_is_refused(complete, monkeypatch):
    """As another machine may make: the same axes with other signs, another bank."""
    path, trak, train, _, _ = complete
    before = contents(trak)
    makers = {"context": (ModelCopy, "make_context"), "projection": (FeatureExtractor, "fit_projection")}
    owner, name = makers[path.stem]
    make = getattr(owner, name)

    def make_another(self, *args):
        made = make(self, *args)
        first = min(made)
        return made | {first: -made[first]}

    monkeypatch.setattr(owner, name, make_another)
    path.unlink()
    del before[path]
    for shards in (3, 2):
        with pytest.raises(
            ValueError, match=rf'at checkpoint 1 .* had lost the {path.stem}, .* delete its folder "checkpoint-'
        ):
            trak.featurize(make_trainer(), train)
        assert contents(trak) == before
        if shards == 3:
            (path.parent / "shard-00001.safetensors").unlink()
            del before[path.parent / "shard-00001.safetensors"]


def test_a_damaged_gram_matrix_is_made_again(complete):
    _, trak, _, targets, scores = complete
    (gram,) = open_store(trak, make_trainer()).folder(0).glob("gram-*")
    whole = gram.read_bytes()
    damage(gram)
    with pytest.warns(UserWarning, match=r"gram-.* is truncated or altered .* counts as lost"):
        assert torch.equal(trak.score(make_trainer(), targets), scores)
    assert gram.read_bytes() == whole
