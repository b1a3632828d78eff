"""Scores whose Q is that of less confident models."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.methods import ExactKernel
from lightning_trak.outputs import RegressionOutput
from lightning_trak.projections import IdentityProjection, SparseProjection
from lightning_trak.scoring.newton.noise import Noise
from lightning_trak.scoring.newton.temperature import Tempered
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_model, make_trainer, stored

METHODS = {
    "primal": (TRAK, {"projection": SparseProjection(16)}),
    "dual": (TRAK, {"projection": IdentityProjection()}),
    "exact": (ExactKernel, {}),
}


@pytest.fixture(scope="module")
def checkpoints():
    return make_checkpoints(2)


def make(name, tmp_path, checkpoints, **options):
    method, more = METHODS[name]
    made = method(make_model(), checkpoints, tmp_path / "store", **more, **options)
    made.featurize(make_trainer(), DataLoader(TRAIN, 8))
    return made


def score(method, **how):
    return method.score(make_trainer(), DataLoader(TARGETS, 8), **how)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_scores_are_the_formula(tmp_path, checkpoints, name):
    """At each checkpoint, the scores at temperature 1 times the ratio of Q; K and the damping do not change."""
    expected = torch.zeros(len(TARGETS), len(TRAIN), dtype=torch.float64)
    for number, checkpoint in enumerate(checkpoints):
        plain = score(make(name, tmp_path / str(number), [checkpoint], damping=0.5)).double()
        store = stored(tmp_path / str(number) / "store")
        margins = torch.cat([store.read(0, shard).outputs for shard in range(store.num_shards)]).double()
        expected += plain * torch.sigmoid(-margins / 1.6) / torch.sigmoid(-margins) / len(checkpoints)
    found = score(make(name, tmp_path, checkpoints, damping=0.5, temperature=1.6)).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_question_has_the_same_scores(tmp_path, checkpoints, name):
    method = make(name, tmp_path, checkpoints, temperature=1.7)
    scores, trainer = score(method), make_trainer()
    close = {"rtol": 1e-3, "atol": 1e-5 * float(scores.abs().max())}
    torch.testing.assert_close(score(method, top_k=4).values, scores.topk(4).values, **close)
    torch.testing.assert_close(score(method, train=DataLoader(TRAIN, 8)), scores, **close)
    itself = method.score(trainer, DataLoader(TRAIN, 8)).diagonal()
    torch.testing.assert_close(method.self_influence(trainer), itself, rtol=1e-3, atol=1e-5 * float(itself.abs().max()))


def test_without_a_word_it_goes_with_the_damping(tmp_path, checkpoints):
    def scores(**options):
        return score(make("primal", tmp_path, checkpoints, **options))

    assert torch.equal(scores(), scores(temperature="auto"))
    assert torch.equal(scores(damping=0.5), scores(damping=0.5, temperature=1))
    assert torch.equal(scores(loss_gradients="averaged"), scores(loss_gradients="averaged", temperature=1))
    assert not torch.equal(scores(), scores(temperature=1))


def test_a_squared_error_is_divided():
    outputs = torch.randn(7)
    found = Tempered(RegressionOutput(), 2).loss_gradients(outputs)
    torch.testing.assert_close(found, 0.5 * RegressionOutput().derivatives(outputs)[0])


def noise_of(curvatures):
    noise = Noise(len(curvatures))
    noise.add(torch.ones_like(curvatures), curvatures)
    return noise


def test_the_temperature_says_how_little_one_checkpoint_says_of_many():
    shared, own = torch.rand(5, 4000, generator=torch.Generator().manual_seed(0)).double().split([1, 4])
    assert noise_of(own[:1]).temperature == pytest.approx(1 / 0.7)
    assert noise_of(own[:1].expand(3, -1)).temperature == pytest.approx(1)
    assert noise_of(shared + own).temperature == pytest.approx(2**0.5, abs=0.04)
    assert noise_of(own).temperature == pytest.approx(10 / 3, abs=0.4)
    for count in (1, 3):
        assert noise_of(torch.full((count, 20), 2.0)).temperature == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_auto_is_the_number_that_it_chooses(tmp_path, checkpoints, name):
    method = make(name, tmp_path, checkpoints, temperature="auto", damping=0.5)
    store = stored(tmp_path / "store")
    rows = [[store.read(number, shard).curvatures for shard in range(store.num_shards)] for number in range(2)]
    noise = noise_of(torch.stack([torch.cat(part) for part in rows]))
    noise.lags = fitted(method, store).noise.lags
    assert noise.temperature > 1
    expected = score(make(name, tmp_path, checkpoints, temperature=noise.temperature, damping=0.5))
    torch.testing.assert_close(score(method), expected)


def fitted(method, store):
    scorer = method.make_scorer(store)
    scorer.fit(torch.device("cpu"))
    return scorer


@pytest.mark.parametrize("method", [TRAK, ExactKernel])
@pytest.mark.parametrize("temperature", [0, -1.5, 0.5, "on", float("nan"), float("inf"), "high", True, 10**400])
def test_what_is_no_temperature_is_refused(tmp_path, method, temperature):
    with pytest.raises(ValueError, match="temperature must be at least 1 and finite, or 'auto'"):
        method(make_model(), store=tmp_path, temperature=temperature)


def test_published_averages_are_refused(tmp_path):
    for method in (TRAK, ExactKernel):
        with pytest.raises(ValueError, match=r"temperature=1\.2 needs loss_gradients='per_checkpoint'"):
            method(make_model(), store=tmp_path, temperature=1.2, loss_gradients="averaged")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", ["auto", 1.6])
def test_rescored_candidates_have_it(tmp_path, checkpoints, temperature):
    method = make("dual", tmp_path, checkpoints, temperature=temperature)
    expected, found = score(method).topk(4), score(method, top_k=4, largest=True, rescore=8)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.indices, expected.indices)
