"""How far the training is from its end: against dense formulas, and for models that have arrived and that have not."""

import math

import pytest
import torch

from lightning_trak import TRAK
from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.outputs import (
    CausalLMMargin,
    ClassificationMargin,
    ContrastiveMargin,
    MultiLabelMargin,
    NegativeLoss,
    SegmentationMargin,
)
from lightning_trak.scoring import DualScorer, PrimalScorer
from lightning_trak.scoring.newton import gram as gram_module
from lightning_trak.scoring.newton.gram import DampedGram, gram_matrix
from lightning_trak.scoring.newton.lag import alignment, find_lag, residual_sums
from lightning_trak.scoring.newton.noise import Noise
from lightning_trak.scoring.newton.temperature import Tempered

CPU = torch.device("cpu")
N, K = 400, 20


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("aligned", "lag"),
    [
        (lambda factor: 0.0, 1),
        (lambda factor: 1.0, 1),
        (lambda factor: 0.9 * factor, 1),
        (lambda factor: 3.0, 3),
        (lambda factor: 3 * factor**0.5, 9),
        (lambda factor: 50 / factor, 50**0.5),
        (lambda factor: 2 * factor, 16),
    ],
)
def test_the_lag_is_where_the_factor_is_as_large_as_the_alignment(aligned, lag):
    assert find_lag(aligned) == pytest.approx(lag)


def test_a_lag_of_one_takes_one_system():
    asked = []
    assert find_lag(lambda factor: asked.append(factor) or 0.5) == 1
    assert asked == [1]


def logistic(steps, seed=0):
    """Features, margins and labels' signs of a logistic regression after some steps of gradient descent."""
    inputs = torch.randn(N, K, generator=draw(seed), dtype=torch.float64) @ torch.logspace(0, -1.5, K).diag().double()
    right = 2 * inputs.sum(1) + torch.randn(N, generator=draw(seed + 1), dtype=torch.float64)
    signs = right.sign()
    phi, weights = inputs * signs.unsqueeze(1), torch.zeros(K, dtype=torch.float64)
    for _ in range(steps):
        weights += phi.T @ torch.sigmoid(-phi @ weights) / N - 1e-3 * weights
    margins = phi @ weights
    p = margins.sigmoid()
    return Features(phi, margins, 1 - p, p * (1 - p))


def store_of(directory, *checkpoints, shard_size=64):
    names = [str(number) for number in range(len(checkpoints))]
    store = FeatureStore(directory, {"checkpoints": names, "dtype": "float64"}, N, shard_size)
    for number, rows in enumerate(checkpoints):
        for shard in range(store.num_shards):
            examples = slice(store.shard(shard).start, store.shard(shard).stop)
            store.write(number, shard, Features(*(column[examples] for column in rows)))
    return store


def fitted(store, damping="auto", temperature=1.0, subsets=None, dual=False):
    tempered = Tempered(ClassificationMargin(), temperature)
    kind = DualScorer if dual else PrimalScorer
    scorer = kind(store, "gauss_newton", damping, "per_checkpoint", 0.0, subsets, tempered)
    scorer.fit(CPU)
    return scorer


def scores(scorer, count=1):
    targets = torch.randn(3, K, generator=draw(9), dtype=torch.float64)
    return scorer.score([scorer.precondition(number, targets) for number in range(count)])


def dense_alignment(rows, ridge, seen=slice(None)):
    phi, _, residuals, curvatures = (column[seen] for column in rows)
    gram = (phi * curvatures.unsqueeze(1)).T @ phi
    damped = gram + ridge * torch.eye(K, dtype=torch.float64)
    step = ridge * torch.linalg.solve(damped, phi.T @ residuals).square().sum()
    directions = torch.linalg.solve(damped, gram).trace()
    dispersion = (residuals.square() * phi.square().sum(1)).sum() / gram.trace()
    return float(step / (0.6 * directions * dispersion.sqrt()))


def dense_lag(rows, seen=slice(None)):
    weights = rows.curvatures[seen] * rows.features[seen].square().sum(1)
    noise = Noise(1)
    noise.add(rows.loss_gradients[None], rows.curvatures[None])
    unit = 1.75 * noise.dispersions[0] * float(weights.square().sum() / weights.sum()) * len(weights) / N
    return find_lag(lambda factor: dense_alignment(rows, factor * unit, seen))


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 3000])
def test_the_lag_is_that_of_the_dense_formula(tmp_path, dual, steps):
    rows = logistic(steps)
    scorer = fitted(store_of(tmp_path, rows), dual=dual)
    assert scorer.noise.lags == pytest.approx([dense_lag(rows)], rel=1e-6)


def test_a_short_training_has_a_lag_and_one_that_has_arrived_has_none(tmp_path):
    lags = [fitted(store_of(tmp_path / str(steps), logistic(steps))).noise.lags[0] for steps in (1, 4, 3000)]
    assert lags[0] > lags[1] > 1.5
    assert lags[2] == 1


@pytest.mark.parametrize("dual", [False, True])
def test_damping_and_temperature_follow_the_lag(tmp_path, dual):
    store = store_of(tmp_path, logistic(4))
    scorer = fitted(store, temperature="auto", dual=dual)
    (lag,) = scorer.noise.lags
    assert lag > 1
    noise = Noise(1)
    noise.add(store.read(0, 0).loss_gradients[None], store.read(0, 0).curvatures[None])
    assert scorer.noise.temperature == pytest.approx(lag**1.5 / 0.7)
    by_hand = fitted(store, scorer._system(0)[1], scorer.noise.temperature, dual=dual)
    torch.testing.assert_close(scores(scorer), scores(by_hand))
    assert scorer.noise.levels(weighted=True)[0] == pytest.approx(lag * scorer.noise.dispersions[0])


@pytest.mark.parametrize("damping", [1e-3, 0.3, 1e25])
def test_with_a_damping_of_ones_own_the_lag_is_the_same(tmp_path, damping):
    store = store_of(tmp_path, logistic(4))
    automatic, own = fitted(store, "auto", "auto"), fitted(store, damping, "auto")
    assert own.noise.lags == automatic.noise.lags
    assert own.noise.temperature == automatic.noise.temperature > 1.43
    assert own._system(0)[1] == damping
    assert scores(own).isfinite().all()


def test_several_checkpoints_have_lags_of_their_own_and_one_temperature(tmp_path):
    store = store_of(tmp_path, logistic(1), logistic(3000))
    scorer = fitted(store, temperature="auto")
    first, second = scorer.noise.lags
    assert first > 1.5
    assert second == 1
    plain = Noise(2)
    plain.sums = scorer.noise.sums
    assert scorer.noise.temperature == pytest.approx(plain.temperature * first**0.75)


@pytest.mark.parametrize("dual", [False, True])
def test_examples_that_the_model_has_not_seen_do_not_count(tmp_path, dual):
    rows, mask = logistic(4), torch.arange(N) % 3 > 0
    subset = TrainingSubset(mask)
    scorer = fitted(store_of(tmp_path, rows), subsets=[subset], dual=dual)
    seen = Features(*(column[mask] for column in rows))
    noise = Noise(1)
    noise.add(rows.loss_gradients[None], rows.curvatures[None], mask[None])
    weights = seen.curvatures * seen.features.square().sum(1)
    unit = 1.75 * noise.levels(weighted=True)[0] * float(weights.square().sum() / weights.sum())
    assert scorer.noise.lags == pytest.approx([find_lag(lambda factor: dense_alignment(seen, factor * unit))], rel=1e-6)


def test_losses_that_are_means_over_predictions_change_the_temperature_alone(tmp_path):
    store = store_of(tmp_path, logistic(1))
    settings = store, "gauss_newton", "auto", "per_checkpoint", 0.0, None, Tempered(ClassificationMargin(), "auto")
    scorer = PrimalScorer(*settings, averages=True)
    scorer.fit(CPU)
    (lag,) = scorer.noise.lags
    assert lag > 1
    assert scorer.noise.temperature == pytest.approx(lag**1.5 / 0.7)
    assert scorer.noise.levels(weighted=True) == scorer.noise.dispersions


@pytest.mark.parametrize(
    "output",
    [
        CausalLMMargin(),
        SegmentationMargin(),
        MultiLabelMargin(),
        ContrastiveMargin(),
        NegativeLoss(lambda module, batch: batch),
    ],
)
def test_outputs_of_several_predictions_say_so(tmp_path, output):
    assert output.averages
    model = torch.nn.Linear(2, 2)
    method = TRAK(model, [model.state_dict()], tmp_path / "unused", output=output, curvature="gauss_newton")
    assert method.make_scorer(store_of(tmp_path / "store", logistic(1))).averages
    assert not ClassificationMargin.averages


def test_a_given_lag_takes_the_place_of_the_measured_one(tmp_path):
    store = store_of(tmp_path, logistic(1), logistic(4))
    settings = store, "gauss_newton", "auto", "per_checkpoint", 0.0, None, Tempered(ClassificationMargin(), "auto")
    one, three = (PrimalScorer(*settings, lag=lag) for lag in (1.0, 3.0))
    for scorer in (one, three):
        scorer.fit(CPU)
    assert three.noise.temperature == pytest.approx(3**1.5 * one.noise.temperature)
    assert three.noise.levels(weighted=True) == pytest.approx([3 * level for level in one.noise.levels(weighted=True)])
    assert scorer._system(0)[1] == pytest.approx(3 * one._system(0)[1])


@pytest.mark.parametrize("lag", [0, 0.9, -2, float("nan"), float("inf"), "Auto", None, True, 10**400])
def test_what_is_no_lag_is_refused_at_construction(tmp_path, lag):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="lag must be at least 1 and finite, or 'auto'; got"):
        TRAK(model, [model.state_dict()], tmp_path, output=ClassificationMargin(), lag=lag)


def test_order_and_shards_do_not_matter(tmp_path):
    rows, order = logistic(4), torch.randperm(N, generator=draw())
    expected = scores(fitted(store_of(tmp_path / "one", rows), temperature="auto"))
    mixed = Features(*(column[order] for column in rows))
    found = scores(fitted(store_of(tmp_path / "other", mixed, shard_size=7), temperature="auto"))
    torch.testing.assert_close(found, expected[:, order])


def test_factors_that_are_made_again_keep_their_damping(tmp_path, monkeypatch):
    store = store_of(tmp_path, logistic(4), logistic(8))
    expected = scores(fitted(store), 2)
    monkeypatch.setattr("lightning_trak.scoring.newton.trak._SYSTEM_BYTES", 0)
    torch.testing.assert_close(scores(fitted(store), 2), expected)


def test_the_sums_of_residuals_are_kept_with_the_gram_matrix(tmp_path, monkeypatch):
    store = store_of(tmp_path, logistic(4))
    expected = fitted(store).noise.lags
    monkeypatch.setattr("lightning_trak.scoring.newton.primal.residual_sums", None)
    assert fitted(store).noise.lags == expected


def test_a_squared_error_has_no_scale_of_noise():
    """Then only the sizes of the residuals say what noise would do, and their unit does not matter."""
    assert alignment(2.0, 5.0, 4.0, scaled=True) == pytest.approx(2 / (0.6 * 5 * 2))
    assert alignment(2.0, 5.0, 4.0, scaled=False) == pytest.approx(2 / (0.6 * 5 * 4))
    assert alignment(2e6, 5.0, 4e6, scaled=False) == pytest.approx(2 / (0.6 * 5 * 4))


def test_no_residuals_have_no_lag(tmp_path):
    assert alignment(0.0, 5.0, 0.0, scaled=True) == 0
    rows = logistic(4)._replace(loss_gradients=torch.zeros(N, dtype=torch.float64))
    assert fitted(store_of(tmp_path, rows)).noise.lags == [1]


def test_directions_are_the_shares_of_eigenvalues(monkeypatch):
    monkeypatch.setattr(gram_module, "_ROWS", 7)
    rows = logistic(4)
    gram, _ = gram_matrix([rows], "gauss_newton", K, CPU)
    system = DampedGram(gram, 0.2, torch.float64, "a")
    eigenvalues = torch.linalg.eigvalsh(gram)
    expected = (eigenvalues / (eigenvalues + system.ridge)).sum()
    assert system.effective_dimension() == pytest.approx(float(expected))
    vast = DampedGram(gram, 1e20, torch.float64, "a")
    assert vast.effective_dimension() == pytest.approx(K * 1e-20)


def test_residuals_are_read_where_something_is_chosen_by_them(tmp_path, monkeypatch):
    store = store_of(tmp_path, logistic(4))
    monkeypatch.setattr("lightning_trak.scoring.newton.primal.residual_sums", None)
    fitted(store, 0.5)
    with pytest.raises(TypeError):
        fitted(store)


def test_residual_sums_are_those_of_all_rows():
    rows = logistic(4)
    parts = [Features(*(column[part] for column in rows)) for part in (slice(0, 9), slice(9, N))]
    pull, squares = residual_sums(parts, K, CPU)
    torch.testing.assert_close(pull, rows.loss_gradients @ rows.features)
    assert float(squares) == pytest.approx(
        math.fsum((rows.loss_gradients.square() * rows.features.square().sum(1)).tolist())
    )
