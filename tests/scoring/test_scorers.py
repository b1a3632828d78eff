"""Scores from stored features against a few lines of NumPy, and Gram matrices that must not be trusted."""

import warnings

import numpy as np
import pytest
import torch
from torch.linalg import solve_triangular

from lightning_trak.features.dtypes import feature_dtype
from lightning_trak.features.rows import Features, StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring import GradientDotScorer, PrimalScorer
from lightning_trak.scoring.newton.gram import DampedGram, gram_matrix

N, K, M = 50, 6, 3
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path):
    generator = torch.Generator().manual_seed(0)
    store = FeatureStore(tmp_path, {"checkpoints": ["a", "b", "c"], "dtype": "float32"}, N, shard_size=8)
    for checkpoint in range(M):
        scale = 10.0 ** (checkpoint - 1)  # checkpoints whose gradients differ a lot in size
        for shard in range(store.num_shards):
            n = len(store.shard(shard))
            features = torch.randn(n, K, generator=generator) * scale
            outputs = torch.randn(n, generator=generator)
            p = outputs.sigmoid()
            store.write(checkpoint, shard, Features(features, outputs, 1 - p, p * (1 - p)))
    return store


def reference(store, targets, curvature, damping, loss_gradients):
    """(num_targets, num_train), in float64 by NumPy."""
    products, qs = [], []
    for checkpoint in range(M):
        shards = [store.read(checkpoint, shard) for shard in range(store.num_shards)]
        phi = np.concatenate([shard.features.numpy() for shard in shards]).astype(float)
        q = np.concatenate([shard.loss_gradients.numpy() for shard in shards]).astype(float)
        r = np.concatenate([shard.curvatures.numpy() for shard in shards]).astype(float)
        gram = (phi * (r if curvature == "gauss_newton" else np.ones(N))[:, None]).T @ phi
        gram += damping * np.diag(gram).mean() * np.eye(K)
        products.append(targets[checkpoint].numpy().astype(float) @ np.linalg.inv(gram) @ phi.T)
        qs.append(q)
    if loss_gradients == "averaged":
        return np.mean(products, axis=0) * np.mean(qs, axis=0)
    return np.mean([product * q for product, q in zip(products, qs, strict=True)], axis=0)


@pytest.mark.parametrize("curvature", ["gauss_newton", "identity"])
@pytest.mark.parametrize("loss_gradients", ["per_checkpoint", "averaged"])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_scores_are_the_formula(store, curvature, loss_gradients, damping):
    targets = [torch.randn(4, K) * 10.0**m for m in range(M)]
    scorer = PrimalScorer(store, curvature, damping, loss_gradients, 0.0)
    scorer.fit(CPU)
    scores = scorer.score([scorer.precondition(m, rows) for m, rows in enumerate(targets)])
    expected = reference(store, targets, curvature, damping, loss_gradients)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_directions_at_the_first_checkpoints_alone_are_scored_there(store):
    directions = [torch.randn(4, K) for _ in range(M)]
    scorer = PrimalScorer(store, "identity", 0.5, "per_checkpoint", 0.0)
    absent = [*directions[:2], torch.zeros(4, K)]
    torch.testing.assert_close(scorer.score(directions[:2]), scorer.score(absent))


def test_damping_means_the_same_at_any_scale():
    phi = torch.randn(30, K, dtype=torch.float64)
    gram = phi.T @ phi
    rows = torch.randn(2, K, dtype=torch.float64)
    one = DampedGram(gram, 0.3, torch.float64, "x").solve(rows)
    tiny = DampedGram(gram * 1e-30, 0.3, torch.float64, "x").solve(rows)
    torch.testing.assert_close(tiny * 1e-30, one)


def test_soft_threshold(store):
    targets = [torch.randn(4, K) for _ in range(M)]

    def score(threshold):
        scorer = PrimalScorer(store, "identity", 0.1, "averaged", threshold)
        scorer.fit(CPU)
        return scorer.score([scorer.precondition(m, rows) for m, rows in enumerate(targets)])

    plain, cut = score(0.0), score(0.01)
    torch.testing.assert_close(cut, plain.sign() * (plain.abs() - 0.01).clamp(min=0))
    assert 0 < int((cut == 0).sum()) < cut.numel()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 9, 20, 50, 80])
def test_top_k_is_the_top_of_the_full_matrix(store, k, largest):
    scorer = PrimalScorer(store, "gauss_newton", 1.0, "per_checkpoint", 0.0)
    scorer.fit(CPU)
    directions = [scorer.precondition(m, torch.randn(5, K)) for m in range(M)]
    full = scorer.score(directions)
    found = scorer.score(directions, top_k=k, largest=largest)
    expected = full.topk(min(k, N), largest=largest)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)
    assert found.indices.dtype == torch.int64


def test_the_gram_matrix_is_read_again_only_if_features_changed(store, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lightning_trak.scoring.newton.primal.gram_matrix", lambda *args: calls.append(args) or gram_matrix(*args)
    )

    def fit():
        calls.clear()
        PrimalScorer(store, "gauss_newton", 1.0, "per_checkpoint", 0.0).fit(CPU)
        return len(calls)

    assert fit() == M
    assert fit() == 0
    rows = store.read(1, 2)
    store.write(1, 2, rows._replace(features=rows.features * 2))
    assert fit() == 1


class OneOf(Ranks):
    """A rank whose sums stay its own part."""

    def sum(self, tensor):
        return tensor


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1, 7, 300, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gram_matrix_does_not_depend_on_the_number_of_ranks(tmp_path, monkeypatch, shard_size, dtype):
    n, generator = 2500 if shard_size > 1 else 1100, torch.Generator().manual_seed(0)
    identity = {"checkpoints": ["a"], "dtype": str(dtype).removeprefix("torch.")}
    store = FeatureStore(tmp_path, identity, n, shard_size=shard_size)
    phi, curvatures = torch.randn(n, K, generator=generator, dtype=dtype), torch.rand(n, generator=generator)
    zeros, shards = torch.zeros(n), []
    for shard in range(store.num_shards):
        rows = slice(store.shard(shard).start, store.shard(shard).stop)
        features = Features(phi[rows], zeros[rows], zeros[rows], curvatures[rows])
        shards.append(StoredFeatures.encode(features, feature_dtype(dtype)))
    monkeypatch.setattr(store, "read_stored", lambda checkpoint, shard: shards[shard])
    monkeypatch.setattr(store, "digest", lambda checkpoint: "the same")
    monkeypatch.setattr(store, "write_extra", lambda *args: None)  # so that each makes its own
    scorer = PrimalScorer(store, "gauss_newton", 1.0, "per_checkpoint", 0.0)
    found = [sum(scorer._gram(0, OneOf(rank, world))[0] for rank in range(world)) for world in (1, 2, 3, 8)]
    expected = (phi.double() * curvatures.double()[:, None]).T @ phi.double()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-3)
    for gram in found[1:]:
        assert (gram - found[0]).abs().max() <= 1e-12 * found[0].abs().max()


def test_what_an_older_format_kept_with_the_gram_matrix_is_made_again(store):
    for checkpoint in range(M):
        store.write_extra(checkpoint, "gram-gauss_newton", {"gram": torch.zeros(K, K)}, store.digest(checkpoint))
    targets = torch.randn(2, K)
    scorer = PrimalScorer(store, "gauss_newton", 0.5, "per_checkpoint", 0.0)
    scorer.fit(CPU)
    scores = scorer.score([scorer.precondition(m, targets) for m in range(M)])
    expected = reference(store, [targets] * M, "gauss_newton", 0.5, "per_checkpoint")
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_singular_gram_is_refused_with_advice():
    phi = torch.randn(4, K, dtype=torch.float64)  # rank 4 < K
    with pytest.raises(ValueError, match=r"Gram matrix of checkpoint 7 .* singular.*use a larger damping \(now 0;"):
        DampedGram(phi.T @ phi, 0.0, torch.float32, "checkpoint 7")
    assert torch.isfinite(DampedGram(phi.T @ phi, 0.1, torch.float32, "x").solve(phi)).all()


def test_a_gram_that_only_rounding_makes_regular_is_refused():
    phi = torch.randn(40, K, dtype=torch.float32)
    phi[:, 5] = phi[:, 4]
    phi[:, 5] += 1e-6 * torch.randn(40)
    gram = phi.double().T @ phi.double()
    assert torch.linalg.cholesky_ex(gram).info == 0
    with pytest.raises(ValueError, match=r"singular to the precision of its torch\.float32 features"):
        DampedGram(gram, 0.0, torch.float32, "x")


def test_an_ill_conditioned_gram_warns():
    gram = torch.diag(torch.logspace(0, -7, K, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match=r"ill-conditioned \(condition number 1.0e\+07\)"):
        DampedGram(gram, 0.0, torch.float32, "x")


def test_the_extreme_eigenvalues_are_numpys():
    phi = torch.randn(60, 30, dtype=torch.float64)
    gram = phi.T @ phi
    eigenvalues = np.linalg.eigvalsh(gram.numpy() / gram.diagonal().mean().item())
    found = DampedGram(gram, 0.0, torch.float64, "x")
    assert 0.8 * eigenvalues[-1] < found.largest < 1.001 * eigenvalues[-1]
    assert 0.999 * eigenvalues[0] < found.smallest < 1.2 * eigenvalues[0]


def test_coarse_features_are_fine_with_damping():
    phi = torch.randn(500, 200, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 200, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coarse = phi.to(torch.bfloat16).double()
        exact, rounded = (DampedGram(x.T @ x, 1.0, torch.bfloat16, "x").solve(phi[:5]) for x in (phi, coarse))
    assert float((exact - rounded).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize(
    ("gram", "match"), [(torch.zeros(3, 3), "is zero"), (torch.full((3, 3), torch.nan), "not fin")]
)
def test_a_gram_that_means_nothing_is_refused(gram, match):
    with pytest.raises(ValueError, match=match):
        DampedGram(gram.double(), 1.0, torch.float32, "x")


def test_negative_curvature_is_refused():
    rows = Features(torch.randn(3, 2), torch.zeros(3), torch.ones(3), torch.tensor([1.0, -0.5, 1.0]))
    with pytest.raises(ValueError, match=r"second derivative of the loss is negative \(-0.5\)"):
        gram_matrix([rows], "gauss_newton", 2, CPU)
    gram_matrix([rows], "identity", 2, CPU)


def test_scores_that_overflow_are_refused(store):
    scorer = PrimalScorer(store, "gauss_newton", 1.0, "per_checkpoint", 0.0)
    scorer.fit(CPU)
    directions = [scorer.precondition(m, torch.randn(2, K)) * 3e38 for m in range(M)]
    with pytest.raises(ValueError, match="are not finite"):
        scorer.score(directions)


@pytest.mark.parametrize("loss_gradients", ["per_checkpoint", "averaged"])
def test_self_scores_are_the_diagonal(store, loss_gradients):
    scorer = PrimalScorer(store, "gauss_newton", 0.5, loss_gradients, 0.1)
    scorer.fit(CPU)
    shards = [[store.read(m, shard) for shard in range(store.num_shards)] for m in range(M)]
    train = [torch.cat([part.features for part in parts]) for parts in shards]
    expected = torch.nn.functional.softshrink(
        torch.tensor(reference(store, train, "gauss_newton", 0.5, loss_gradients)).diagonal(), 0.1
    )
    assert (expected == 0).any()
    torch.testing.assert_close(scorer.self_scores().double(), expected, rtol=1e-4, atol=1e-5)


def test_self_scores_take_one_triangular_solve(store, monkeypatch):
    scorer, solve, columns = PrimalScorer(store, "gauss_newton", 0.5, "per_checkpoint", 0.0), solve_triangular, []
    scorer.fit(CPU)

    def counting(factor, right, **options):
        columns.append(right.shape[1])
        return solve(factor, right, **options)

    monkeypatch.setattr(torch.linalg, "solve_triangular", counting)
    scorer.self_scores()
    assert sum(columns) == M * N


def test_self_scores_that_overflow_are_named(store):
    rows = store.read(1, 2)
    (store.directory / "checkpoint-b/shard-00002.safetensors").unlink()
    store.write(1, 2, rows._replace(features=rows.features * 1e30))
    scorer = GradientDotScorer(store, [1 / M] * M, "loss")
    scorer.fit(CPU)
    with pytest.raises(ValueError, match=r"scores of training examples range\(16, 24\) are not finite"):
        scorer.self_scores()


@pytest.mark.parametrize(
    ("dampings", "lag", "said"),
    [
        ([5.01], 1, "damping='auto' is 5.01 at the checkpoint (the dispersion of the loss is 1)"),
        (
            [5.01],
            2.5,
            "damping='auto' is 5.01 at the checkpoint (the dispersion of the loss is 1, the lag of the training 2.5)",
        ),
        (
            [5.01, 5.0100001],
            1,
            "damping='auto' is 5.01 at the checkpoints (the dispersion of the loss is 1, the agreement of the"
            " checkpoints 1)",
        ),
        (
            [5.0, 0.25, 1.0],
            1,
            "damping='auto' is 0.25 to 5 at the checkpoints (the dispersion of the loss is 1, the agreement of the"
            " checkpoints 1)",
        ),
    ],
)
def test_the_damping_that_was_chosen_is_told(tmp_path, monkeypatch, dampings, lag, said):
    identity = {"checkpoints": ["a"] * len(dampings), "dtype": "float32"}
    store, told, chosen = FeatureStore(tmp_path, identity, 8, 8), [], iter(dampings)
    for checkpoint in range(len(dampings)):
        phi = torch.randn(8, K, generator=torch.Generator().manual_seed(checkpoint))
        store.write(checkpoint, 0, Features(phi, *torch.full((3, 8), 0.5)))
    monkeypatch.setattr("lightning_trak.scoring.newton.trak.rank_zero_info", told.append)
    monkeypatch.setattr("lightning_trak.scoring.newton.trak.auto_damping", lambda *args: next(chosen))
    monkeypatch.setattr("lightning_trak.scoring.newton.trak.find_lag", lambda aligned: lag)
    PrimalScorer(store, "gauss_newton", "auto", "per_checkpoint", 0.0).fit(CPU)
    assert told == [f"TRAK: {said}"]


def test_a_panel_of_the_gram_matrix_gives_what_the_whole_gives(monkeypatch):
    phi, curvatures = torch.randn(50, 11, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    expected = (phi * curvatures[:, None]).T @ phi
    for columns in (1, 4, 11, 20):
        monkeypatch.setattr("lightning_trak.scoring.newton.gram._COLUMNS", columns)
        gram, _ = gram_matrix([Features(phi, curvatures, curvatures, curvatures)], "gauss_newton", 11, CPU)
        torch.testing.assert_close(gram, expected)
        assert torch.equal(gram, gram.T)
