"""Scores from features that were rounded to integers, and what is foreseen of their error."""

import warnings

import pytest
import torch

from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.features.dtypes import feature_dtype
from lightning_trak.features.rows import Features, StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring import DualScorer, GradientCosineScorer, GradientDotScorer, PrimalScorer
from lightning_trak.scoring.newton.gram import DampedGram
from lightning_trak.scoring.newton.kernel import DampedKernel, kernel_matrix
from lightning_trak.scoring.newton.rounding import OwnRounding

CPU = torch.device("cpu")


@pytest.fixture
def wide():
    """Exact rows and curvatures with eigenvalues from 1 to 1e-4, as random projections spread them."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(200, 200, generator=generator))[0]
    phi = torch.randn(600, 200, generator=generator) @ torch.diag(torch.logspace(0, -2, 200)) @ turn
    return Features(phi, *torch.rand(3, 600, generator=generator))


def stored_as(tmp_path, rows, dtype, shard_size=100):
    store = FeatureStore(tmp_path / dtype, {"checkpoints": ["a"], "dtype": dtype}, len(rows.features), shard_size)
    rows = rows._replace(features=store.dtype.prepared(rows.features))
    for shard in range(store.num_shards):
        part = store.shard(shard)
        store.write(0, shard, Features(*(column[part.start : part.stop] for column in rows)))
    return store


SCORERS = {
    "trak": lambda store: PrimalScorer(store, "gauss_newton", 1.0, "per_checkpoint", 0.0),
    "averaged": lambda store: PrimalScorer(store, "identity", 1.0, "averaged", 0.0),
    "dot": lambda store: GradientDotScorer(store, [1.0], "loss"),
    "cosine": lambda store: GradientCosineScorer(store, [1.0], "output"),
}


@pytest.mark.parametrize("name", list(SCORERS))
@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.01), ("int4", 0.12)])
def test_scores_from_integers_are_those_from_floats_up_to_rounding(tmp_path, wide, name, dtype, share):
    exact, rounded = (SCORERS[name](stored_as(tmp_path, wide, kind)) for kind in ("float32", dtype))
    features = wide.features[:20] + wide.features[20:40]
    expected, found = [], []
    for scorer, scores in ((exact, expected), (rounded, found)):
        scorer.fit(CPU)
        targets = Features(scorer.store.dtype.prepared(features), *wide[1:])._replace(loss_gradients=torch.ones(20))
        scores.append(scorer.score([scorer.directions(0, targets)]))
    expected, found = torch.cat(expected), torch.cat(found)
    assert share / 5 < float((found - expected).norm() / expected.norm()) < share
    assert float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]) > 1 - share**2
    own, expected = rounded.self_scores(), exact.self_scores()
    assert float((own - expected).norm() / expected.norm()) < share


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_blocks_of_a_shard_give_the_scores_of_the_whole(tmp_path, wide, dtype, monkeypatch):
    store, targets = stored_as(tmp_path, wide, dtype, shard_size=600), Features(*(part[:7] for part in wide))

    def scores():
        scorer = PrimalScorer(store, "gauss_newton", 1.0, "averaged", 0.0)
        monkeypatch.setattr(store, "read_extra", lambda *args: None)
        scorer.fit(CPU)
        return scorer.score([scorer.directions(0, targets)]), scorer.self_scores()

    whole = scores()
    monkeypatch.setattr("lightning_trak.features.rows._BLOCK_BYTES", 200 * 4 * 37)
    for found, expected in zip(scores(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_strips_of_the_kernel_are_decoded_alone(tmp_path, wide, dtype, monkeypatch):
    """Not all features for each strip. Strips may be of odd width."""
    rows = Features(*(column[:50] for column in wide))
    store = stored_as(tmp_path, rows._replace(features=rows.features[:, :99]), dtype, shard_size=20)
    features = torch.cat([store.read(0, shard).features for shard in range(3)]).double()
    monkeypatch.setattr("lightning_trak.scoring.newton.kernel._LEAST_WIDTH", 1)
    monkeypatch.setattr(StoredFeatures, "decode", lambda rows: pytest.fail("all features are decoded"))
    torch.testing.assert_close(kernel_matrix([store], 0, CPU, Ranks()), features @ features.T)


@pytest.mark.parametrize("damping", [1.0, 0.1])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_error_of_scores_is_foreseen(wide, damping, dtype):
    """Scores of training examples for each other, with weights R."""
    real, foreseen = real_and_foreseen(wide, dtype, damping)
    assert 0.8 * real < foreseen < (2 if dtype == "int8" else 1.3) * real


def real_and_foreseen(rows, dtype, damping):
    """By how much rounding changes scores, and what is foreseen by the primal, or by the dual for few examples."""
    dtype = feature_dtype(dtype)
    features = dtype.prepared(rows.features)
    stored = dtype.decode(*dtype.encode(features), features.shape[1])
    weights, scores, (n, k) = rows.curvatures.double(), [], features.shape
    for phi in (features.double(), stored.double()):
        gram = DampedGram((phi * weights[:, None]).T @ phi, damping, torch.float64, "x")
        products = gram.solve(features.double()) @ phi.T
        scores.append(weights.sqrt()[:, None] * products * weights.sqrt())
    real = float((scores[1] - scores[0]).norm() / scores[0].norm())
    system = gram if n >= k else DampedKernel(phi @ phi.T, weights, damping, k, torch.float64, "x", CPU)
    return real, system.score_noise(dtype.error)


FEATURES = {
    "few are large": lambda n, k: torch.where(torch.arange(k) % 20 == 0, 300.0, 1.0),
    "unequal": lambda n, k: 1 / torch.arange(1, k + 1),
    "half are zero": lambda n, k: (torch.arange(k) < k // 2).float(),
    "other ones in each row": lambda n, k: (torch.rand(n, k) < 0.05).float(),
}


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("n", [600, 100])
@pytest.mark.parametrize("name", list(FEATURES))
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_error_is_foreseen_whatever_the_features(dtype, name, n, damping):
    features = torch.randn(n, 301) * FEATURES[name](n, 301)
    real, foreseen = real_and_foreseen(Features(features, *torch.rand(3, n)), dtype, damping)
    assert 0.7 * real < foreseen < 6 * real


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("n", [600, 100])
@pytest.mark.parametrize("signs", [False, True])
def test_what_rounding_removes_is_foreseen(wide, signs, n, damping):
    """Beside a feature that is large in all examples, all of them have the same codes, and K holds no noise."""
    large = torch.full((n, 1), 300.0)
    features = torch.cat([large * torch.randn(n, 1).sign() if signs else large, wide.features[:n]], dim=1)
    real, foreseen = real_and_foreseen(Features(features, *torch.rand(3, n)), "int4", damping)
    assert foreseen > real
    assert damping == 1 or min(real, foreseen) > 0.5


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
def test_what_the_noise_of_each_row_adds_to_the_kernel_is_foreseen(damping):
    """Rows that share more than they differ by: a kernel of few of them holds as much noise as differences."""
    features = torch.randn(1, 1000) + 0.1 * torch.randn(50, 1000)
    real, foreseen = real_and_foreseen(Features(features, *torch.rand(3, 50)), "int4", damping)
    assert 0.7 * real < foreseen < 2 * real


@pytest.mark.parametrize("damping", [1e-4, 1e-2])
def test_rows_of_zeros_have_no_noise(damping):
    """Examples that are skipped, or that have no curvature."""
    features, curvatures = torch.randn(100, 1000), torch.rand(100)
    features[::10] = 0
    curvatures[1::10] = 0
    rows = Features(features, *torch.rand(2, 100), curvatures)
    real, foreseen = real_and_foreseen(rows, "int4", damping)
    assert 0.7 * real < foreseen < 3 * real


@pytest.mark.parametrize("damping", [1e12, 1e16, 1e20, 1e40])
def test_a_huge_damping_leaves_the_error_of_the_features(damping):
    system = DampedGram(torch.eye(20, dtype=torch.float64), damping, torch.float32, "x")
    assert 0 <= system.score_noise(0.1) < 0.11


def test_rounding_that_shows_in_the_scores_warns_or_is_refused(tmp_path, wide):
    stores = {dtype: stored_as(tmp_path, wide, dtype) for dtype in ("int8", "int4")}

    def fit(dtype, damping):
        PrimalScorer(stores[dtype], "gauss_newton", damping, "per_checkpoint", 0.0).fit(CPU)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit("int4", 1.0)
        fit("int8", 1e-3)
    with pytest.warns(
        RuntimeWarning, match=r"changes scores .* checkpoint 0 by about [34]\d% .* use a dtype of more bits"
    ):
        fit("int4", 0.02)
    large = torch.cat([torch.full((600, 1), 300.0), wide.features], dim=1)
    stores["removed"] = stored_as(tmp_path / "large", wide._replace(features=large), "int4")
    with pytest.raises(
        ValueError, match=r"changes scores .* checkpoint 0 by about [\d,]+% .* use a dtype of more bits"
    ):
        fit("removed", 1e-4)
    with pytest.raises(
        ValueError, match=r"changes scores .* checkpoint 0 by about \d{2,}% of their size: .*larger damping"
    ):
        fit("int4", 0.001)


def test_the_lag_is_searched_where_rounding_would_change_scores(tmp_path, wide, monkeypatch):
    """The damping that the lag gives is what counts, not those that are tried on the way."""
    monkeypatch.setattr("lightning_trak.scoring.newton.undamped.alignment", lambda *about: 1e3)
    rows = Features.cat([wide._replace(loss_gradients=torch.zeros(600))] * 3)  # more examples have a smaller damping
    store = stored_as(tmp_path, rows, "int4", shard_size=600)
    with pytest.raises(ValueError, match=r"changes scores .* by about \d\d% .* larger damping"):
        PrimalScorer(store, "gauss_newton", "auto", "per_checkpoint", 0.0, lag=1).fit(CPU)
    scorer = PrimalScorer(store, "gauss_newton", "auto", "per_checkpoint", 0.0)
    scorer.fit(CPU)
    assert scorer.noise.lags == [16]


def test_of_several_checkpoints_there_is_one_warning(tmp_path, wide):
    """About that whose scores rounding changes most."""
    store = FeatureStore(tmp_path / "s", {"checkpoints": ["a", "b", "c"], "dtype": "int4"}, 600, 600)
    noise = torch.randn(600, 200, generator=torch.Generator().manual_seed(0)) / 10
    for checkpoint, features in enumerate((wide.features + noise, wide.features, wide.features + noise)):
        store.write(checkpoint, 0, wide._replace(features=features))
    with pytest.warns(RuntimeWarning) as caught:
        PrimalScorer(store, "gauss_newton", 0.02, "per_checkpoint", 0.0).fit(CPU)
    (message,) = [str(warning.message) for warning in caught if "changes scores" in str(warning.message)]
    assert "checkpoint 1 by about" in message


DTYPES = ("float32", "int4")
OWN = {"primal": (600, PrimalScorer), "dual": (120, DualScorer)}


@pytest.mark.parametrize("name", list(OWN))
@pytest.mark.parametrize("curvature", ["gauss_newton", "identity"])
def test_what_rounding_adds_to_a_score_for_itself_is_foreseen(tmp_path, wide, name, curvature, monkeypatch):
    """Also for examples that the model has not seen."""
    n, kind = OWN[name]
    rows = Features(*(column[:n] for column in wide))._replace(loss_gradients=torch.ones(n))
    subset, foreseen = TrainingSubset(torch.arange(n) % 4 > 0), []
    monkeypatch.setattr(OwnRounding, "check", lambda self, *_: foreseen.append(self._sums[0] / self._sums[1]))
    exact, rounded = (own_scores(stored_as(tmp_path, rows, dtype), kind, curvature, subset, 0.1) for dtype in DTYPES)
    assert foreseen[0] == 0
    assert foreseen[1] > 0.03
    assert float(1 - exact.sum() / rounded.sum()) == pytest.approx(float(foreseen[1]), rel=0.4)


def own_scores(store, kind, curvature="gauss_newton", subset=None, damping=0.3):
    scorer = kind(store, curvature, damping, "per_checkpoint", 0.0, subsets=[subset])
    scorer.fit(CPU)
    return scorer.self_scores()


@pytest.mark.parametrize("name", list(OWN))
@pytest.mark.parametrize("apart", [0.1, 0.01])
def test_scores_for_itself_that_are_mostly_noise_warn_or_are_refused(tmp_path, name, apart):
    """Rows that share almost all."""
    n, kind = OWN[name]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 200, generator=generator) + apart * torch.randn(n, 200, generator=generator)
    rows = Features(features, *torch.rand(3, n, generator=generator))
    store = stored_as(tmp_path, rows, "int4")
    if apart == 0.01:
        with pytest.raises(ValueError, match=r"makes up about \d+% of .* themselves at checkpoint 0.* more bits"):
            own_scores(store, kind, damping=1.0)
    else:
        with pytest.warns(RuntimeWarning, match=r"makes up about [34]\d% of .* themselves at checkpoint 0"):
            own_scores(store, kind, damping=0.5)
