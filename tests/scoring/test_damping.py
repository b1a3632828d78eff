"""The damping that is chosen from the features."""

import numpy as np
import pytest
import torch

from lightning_trak import TRAK
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods.influence import InfluenceFunction
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.scoring import TRAKScorer
from lightning_trak.scoring.damping import auto_damping, require_damping
from lightning_trak.scoring.gram import gram_matrix

CPU = torch.device("cpu")


def make_rows(phi, curvatures):
    return Features(phi, torch.zeros(len(phi)), torch.ones(len(phi)), curvatures)


def chosen(phi, curvatures, curvature="gauss_newton"):
    return chosen_for([make_rows(phi, curvatures)], curvature)


def chosen_for(shards, curvature="gauss_newton"):
    gram, squared_weights = gram_matrix(shards, curvature, shards[0].features.shape[1], CPU)
    return auto_damping(gram.trace(), squared_weights, len(gram))


def test_examples_alike_count_all():
    phi = torch.nn.functional.normalize(torch.randn(40, 6, dtype=torch.float64))
    assert chosen(phi, torch.ones(40)) == pytest.approx(6 / (2 * 40))


def test_examples_without_curvature_do_not_count():
    phi = torch.nn.functional.normalize(torch.randn(40, 6, dtype=torch.float64))
    curvatures = torch.zeros(40)
    curvatures[:5] = 0.2
    assert chosen(phi, curvatures) == pytest.approx(6 / (2 * 5))
    assert chosen(phi, curvatures, "identity") == pytest.approx(6 / (2 * 40))


def test_absolute_damping_is_half_of_what_a_carrying_example_adds():
    phi, curvatures = torch.randn(30, 5, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    weights = curvatures * phi.square().sum(1)
    gram, _ = gram_matrix([make_rows(phi, curvatures)], "gauss_newton", 5, CPU)
    absolute = chosen(phi, curvatures) * gram.diagonal().mean()
    torch.testing.assert_close(absolute, weights.square().sum() / weights.sum() / 2)


def test_no_scale_and_no_order_matters():
    phi, curvatures = torch.randn(30, 5, dtype=torch.float64), torch.rand(30)
    order = torch.randperm(30)
    expected = chosen(phi, curvatures)
    assert chosen(phi[order] * 1e-3, curvatures[order] * 7) == pytest.approx(expected)
    halves = [make_rows(phi[:11], curvatures[:11]), make_rows(phi[11:], curvatures[11:])]
    assert chosen_for(halves) == pytest.approx(expected)


def test_each_checkpoint_gets_its_own(tmp_path):
    store = FeatureStore(tmp_path, {"checkpoints": ["a", "b"]}, 20, shard_size=8)
    phi = torch.randn(2, 20, 4)
    curvatures = torch.stack([torch.ones(20), torch.rand(20) ** 8])
    for checkpoint in range(2):
        for shard in range(store.num_shards):
            examples = list(store.shard(shard))
            store.write(checkpoint, shard, make_rows(phi[checkpoint, examples], curvatures[checkpoint, examples]))
    targets = torch.randn(3, 4)

    def directions(damping, checkpoint):
        scorer = TRAKScorer(store, "gauss_newton", damping, "per_checkpoint", 0.0)
        scorer.fit(CPU)
        return scorer.precondition(checkpoint, targets)

    for checkpoint in range(2):
        damping = chosen(phi[checkpoint], curvatures[checkpoint])
        torch.testing.assert_close(directions("auto", checkpoint), directions(damping, checkpoint))
    assert chosen(phi[1], curvatures[1]) > 1.5 * chosen(phi[0], curvatures[0])


@pytest.mark.parametrize("damping", [float("inf"), float("nan"), -float("inf"), -1, "Auto", None, [0.1]])
def test_damping_that_is_no_number_is_refused_at_construction(tmp_path, damping):
    model = torch.nn.Linear(2, 2)
    weights = [model.state_dict()]
    with pytest.raises(ValueError, match="damping must be at least 0, or 'auto'; got"):
        require_damping(damping)
    with pytest.raises(ValueError, match="damping must be at least 0, or 'auto'; got"):
        TRAK(model, weights, tmp_path, output=ClassificationMargin(), damping=damping)
    with pytest.raises(ValueError, match="damping must be at least 0, or 'auto'; got"):
        InfluenceFunction(model, weights, output=ClassificationMargin(), damping=damping)


def test_dampings_that_are():
    assert [require_damping(value) for value in ("auto", 0, 0.5, 10**30, np.float32(2))] == ["auto", 0, 0.5, 10**30, 2]
