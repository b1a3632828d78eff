"""Batches that cannot be taken apart into examples: each example is then a batch of its own."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.methods import EKFACInfluence, GradientDot, InfluenceFunction
from lightning_trak.projections import IdentityProjection
from tests.graphs import KINDS, GraphMargin, GraphNet, Graphs, Join
from tests.lit import make_trainer, open_store

TRAIN, TARGETS = Graphs(9), Graphs(4, seed=1)


def loader(data, batch_size=4, kind="object", **options):
    return DataLoader(data, batch_size=batch_size, collate_fn=Join(kind), **options)


@pytest.fixture
def model():
    return GraphNet()


def by_autograd(model, data):
    """Outputs and gradients, a graph at a time."""
    values, rows = [], []
    for graph in data:
        (value,) = GraphMargin().output(model, Join("dict")([graph]))
        gradients = torch.autograd.grad(value, list(model.parameters()))
        values.append(value.detach())
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(values), torch.stack(rows)


def dot(model, store, **options):
    projection = IdentityProjection()
    return GradientDot(
        model, store=store, output=GraphMargin(), projection=projection, dtype="float32", effect_on="output", **options
    )


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd(kind, batch_size, model, tmp_path):
    method = dot(model, tmp_path)
    method.featurize(make_trainer(), loader(TRAIN, batch_size, kind))
    store = open_store(method)
    stored = torch.cat([store.read(0, shard).features for shard in range(store.num_shards)])
    values, rows = by_autograd(model, TRAIN)
    torch.testing.assert_close(stored, rows)
    scores = method.score(make_trainer(), loader(TARGETS, batch_size, kind))
    _, targets = by_autograd(model, TARGETS)
    torch.testing.assert_close(scores, targets @ (rows * torch.sigmoid(-values).unsqueeze(1)).T)


def test_workers_and_batch_sizes_make_no_difference(model, tmp_path):
    def scores(name, *how, **options):
        method = dot(model, tmp_path / name)
        method.featurize(make_trainer(), loader(TRAIN, *how, **options))
        return method.score(make_trainer(), loader(TARGETS, *how, **options))

    assert torch.equal(scores("alone", 1), scores("workers", 3, num_workers=1))


def test_a_scorer_takes_batches_of_one(model, tmp_path):
    method = dot(model, tmp_path)
    method.featurize(make_trainer(), loader(TRAIN))
    expected = method.score(make_trainer(), loader(TARGETS))
    found = make_trainer().predict(method.scorer(), loader(TARGETS, 1))
    torch.testing.assert_close(torch.cat(found), expected)
    with pytest.raises(ValueError, match=r"give scorer\(\) batches of one example, or use score\(\)"):
        make_trainer().predict(method.scorer(), loader(TARGETS, 2))


def test_exact_scores_of_the_best(model, tmp_path):
    exact = {"projection": IdentityProjection(), "dtype": "float32", "damping": 1.0}
    trak = TRAK(model, store=tmp_path, output=GraphMargin(), **exact)
    trak.featurize(make_trainer(), loader(TRAIN))
    expected = trak.score(make_trainer(), loader(TARGETS), top_k=2)
    found = trak.score(make_trainer(), loader(TARGETS), top_k=2, rescore=9)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.indices, expected.indices)


def test_influence_functions(model):
    def scores(batch_size):
        method = InfluenceFunction(model, output=GraphMargin(), damping=0.1)
        return method.attribute(make_trainer(), loader(TRAIN, batch_size), loader(TARGETS, batch_size))

    torch.testing.assert_close(scores(4), scores(1))
    with pytest.raises(ValueError, match="the collate function joins examples so that they cannot be taken apart"):
        EKFACInfluence(model, output=GraphMargin()).attribute(make_trainer(), loader(TRAIN), loader(TARGETS))


@pytest.mark.parametrize("engine", ["hooks", "functional"])
def test_other_engines_are_refused(engine, model, tmp_path):
    with pytest.raises(ValueError, match=f"engine='{engine}' cannot differentiate this model correctly"):
        dot(model, tmp_path, engine=engine).featurize(make_trainer(), loader(TRAIN))


def test_an_output_that_depends_on_the_other_graphs_is_refused(tmp_path):
    """Unless training has seen one graph at a time, too."""
    model = GraphNet(normalizes=True)
    with pytest.raises(ValueError, match="another number in a batch with another example"):
        dot(model, tmp_path / "joined").featurize(make_trainer(), loader(TRAIN))
    dot(model, tmp_path / "alone").featurize(make_trainer(), loader(TRAIN, 1))
