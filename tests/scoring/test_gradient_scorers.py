"""Products and cosines of stored features, on features that are hard."""

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.scoring import GradientCosineScorer, GradientDotScorer

N, K = 20, 6


def make_rows(n, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, K, generator=generator).to(dtype)
    loss_gradients = torch.randn(n, generator=generator)
    return Features(features, torch.zeros(n), loss_gradients, torch.ones(n))


def make_scores(tmp_path, kind, rows, targets, effect_on="loss"):
    identity = {"checkpoints": ["a"], "dtype": str(rows.features.dtype).removeprefix("torch.")}
    store = FeatureStore(tmp_path, identity, N, shard_size=8)
    for shard in range(store.num_shards):
        part = store.shard(shard)
        store.write(0, shard, Features(*(column[part.start : part.stop] for column in rows)))
    scorer = kind(store, [1.0], effect_on)
    scorer.fit(torch.device("cpu"))
    return scorer.score([scorer.directions(0, targets)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cosines_are_scikit_learns(tmp_path, dtype):
    rows, targets = make_rows(N, dtype=dtype), make_rows(4, seed=1, dtype=dtype)
    scores = make_scores(tmp_path, GradientCosineScorer, rows, targets)
    train, aim = ((-part.loss_gradients.unsqueeze(1) * part.features.double()).numpy() for part in (rows, targets))
    torch.testing.assert_close(scores.double(), torch.from_numpy(cosine_similarity(aim, train)), rtol=0, atol=1e-6)


def test_cosines_do_not_depend_on_the_size_of_gradients(tmp_path):
    rows, targets = make_rows(N), make_rows(4, seed=1)
    expected = make_scores(tmp_path / "a", GradientCosineScorer, rows, targets)
    sizes = torch.logspace(-30, 30, N).unsqueeze(1)  # whose squares float32 does not hold
    rows = rows._replace(features=rows.features * sizes)
    targets = targets._replace(features=targets.features * 1e-30)
    found = make_scores(tmp_path / "b", GradientCosineScorer, rows, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("effect_on", ["loss", "output"])
@pytest.mark.parametrize("kind", [GradientCosineScorer, GradientDotScorer])
def test_zero_gradients_have_scores_of_zero(tmp_path, kind, effect_on):
    rows, targets = make_rows(N), make_rows(4, seed=1)
    rows.features[3] = 0
    rows.loss_gradients[5] = 0
    targets.features[1] = 0
    targets.loss_gradients[2] = 0
    zero = make_scores(tmp_path, kind, rows, targets, effect_on) == 0
    expected = torch.zeros(4, N, dtype=torch.bool)
    expected[:, [3, 5]] = True
    expected[1] = True
    expected[2] |= effect_on == "loss"
    assert torch.equal(zero, expected)


def test_products_that_overflow_are_refused(tmp_path):
    rows, targets = (part._replace(features=part.features * 1e30) for part in (make_rows(N), make_rows(2)))
    with pytest.raises(ValueError, match=r"are not finite: the features overflow torch\.float32"):
        make_scores(tmp_path, GradientDotScorer, rows, targets)
