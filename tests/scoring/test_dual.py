"""Fewer training examples than features: scores by n x n systems, against float64 references and the primal."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.projections import IdentityProjection, SparseProjection
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring import DualScorer, PrimalScorer, smaller_scorer
from lightning_trak.scoring import targets as targets_module
from lightning_trak.scoring.damping import auto_damping
from lightning_trak.scoring.newton import kernel as kernel_module
from lightning_trak.scoring.newton import trak as trak_module
from lightning_trak.scoring.newton.gram import DampedGram, gram_matrix
from lightning_trak.scoring.newton.kernel import DampedKernel, kernel_matrix
from lightning_trak.scoring.newton.noise import Noise
from lightning_trak.scoring.newton.trak import TRAKScorer
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_data, make_model, make_trainer, open_store
from tests.scoring.test_scorers import OneOf

CPU = torch.device("cpu")
N, K, M = 30, 70, 2


def make_store(directory, n=N, k=K, dtype=torch.float32, shard_size=8, no_curvature=()):
    generator = torch.Generator().manual_seed(0)
    identity = {"checkpoints": ["a", "b"][:M], "dtype": str(dtype).removeprefix("torch.")}
    store = FeatureStore(directory, identity, n, shard_size=shard_size)
    spectrum = torch.logspace(0, -1.5, k, dtype=torch.float64)
    for checkpoint in range(M):
        phi = torch.randn(n, k, generator=generator, dtype=torch.float64) * spectrum * 10.0**checkpoint
        p = torch.randn(n, generator=generator, dtype=torch.float64).sigmoid()
        curvatures = p * (1 - p)
        for example, curvature in no_curvature:
            curvatures[example] = curvature
        for shard in range(store.num_shards):
            rows = slice(store.shard(shard).start, store.shard(shard).stop)
            part = Features(phi[rows].to(dtype), p[rows], 1 - p[rows], curvatures[rows])
            store.write(checkpoint, shard, part)
    return store


def columns(store, checkpoint, name):
    shards = [getattr(store.read(checkpoint, shard), name) for shard in range(store.num_shards)]
    return torch.cat(shards).double()


def reference(store, targets, curvature, damping, loss_gradients="per_checkpoint"):
    """(num_targets, num_train), by the k x k formula in float64."""
    products, qs, noise = [], [], Noise(M)
    both = [torch.stack([columns(store, c, name) for c in range(M)]) for name in ("loss_gradients", "curvatures")]
    noise.add(*both)
    levels = noise.levels(curvature == "gauss_newton")
    for checkpoint in range(M):
        phi, q, r = (columns(store, checkpoint, name) for name in ("features", "loss_gradients", "curvatures"))
        weights = r if curvature == "gauss_newton" else torch.ones_like(r)
        gram = (phi * weights[:, None]).T @ phi
        w = weights * phi.square().sum(1)
        relative = damping
        if damping == "auto":
            relative = auto_damping(w.sum(), w.square().sum(), len(gram), levels[checkpoint])
        ridge = relative * gram.diagonal().mean()
        gram += ridge * torch.eye(len(gram), dtype=torch.float64)
        products.append(targets[checkpoint].double() @ torch.linalg.solve(gram, phi.T))
        qs.append(q)
    if loss_gradients == "averaged":
        return torch.stack(products).mean(0) * torch.stack(qs).mean(0)
    return torch.stack([product * q for product, q in zip(products, qs, strict=True)]).mean(0)


def fitted(store, curvature="gauss_newton", damping=0.1, loss_gradients="per_checkpoint"):
    scorer = smaller_scorer(store)(store, curvature, damping, loss_gradients, 0.0)
    scorer.fit(CPU)
    return scorer


def scored(scorer, targets, **options):
    return scorer.score([scorer.precondition(m, rows) for m, rows in enumerate(targets)], **options)


def make_targets(k=K, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, k, generator=generator, dtype=torch.float64).to(dtype) for _ in range(M)]


def assert_close(found, expected, tolerance=1e-6):
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("curvature", ["gauss_newton", "identity"])
@pytest.mark.parametrize("damping", [1e-4, 1e-3, 1e-2, 0.1, 1.0, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_those_of_the_primal(tmp_path, curvature, damping, dtype):
    store, targets = make_store(tmp_path, dtype=dtype), make_targets(dtype=dtype)
    found = scored(fitted(store, curvature, damping), targets)
    assert found.dtype == dtype
    assert_close(found, reference(store, targets, curvature, damping), 1e-6 if dtype == torch.float32 else 1e-9)


def test_few_examples_with_many_features_and_little_damping(tmp_path):
    store, targets = make_store(tmp_path, n=9, k=900), make_targets(900)
    assert_close(scored(fitted(store, damping=1e-4), targets), reference(store, targets, "gauss_newton", 1e-4))


def test_the_k_x_k_solver_gives_the_same(tmp_path):
    store, targets = make_store(tmp_path, dtype=torch.float64), make_targets(dtype=torch.float64)
    dual, expected = fitted(store, damping=0.01), []
    for checkpoint in range(M):
        rows = [store.read(checkpoint, shard) for shard in range(store.num_shards)]
        gram, _ = gram_matrix(rows, "gauss_newton", K, CPU)
        solved = DampedGram(gram, 0.01, torch.float64, "x").solve(targets[checkpoint])
        expected.append(
            solved @ columns(store, checkpoint, "features").T * columns(store, checkpoint, "loss_gradients")
        )
    assert_close(scored(dual, targets), torch.stack(expected).mean(0), 1e-10)
    assert type(dual) is DualScorer


def test_as_many_examples_as_features_are_solved_by_features(tmp_path):
    assert type(fitted(make_store(tmp_path, n=20, k=20))) is PrimalScorer


@pytest.mark.parametrize("curvature", [0.0, 1e-30, 1e-12])
def test_examples_without_curvature_have_scores(tmp_path, curvature):
    store = make_store(tmp_path, dtype=torch.float64, no_curvature=[(0, curvature), (17, curvature), (29, curvature)])
    targets = make_targets(dtype=torch.float64)
    found, expected = (
        scored(fitted(store, damping=1e-3), targets),
        reference(store, targets, "gauss_newton", 1e-3),
    )
    some = [0, 17, 29]
    assert expected[:, some].abs().max() > 0.1 * expected.abs().max()
    assert_close(found[:, some], expected[:, some], 1e-9)
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("loss_gradients", ["per_checkpoint", "averaged"])
def test_self_scores_are_the_diagonal(tmp_path, loss_gradients):
    store = make_store(tmp_path, no_curvature=[(3, 0.0)])
    train = [columns(store, m, "features") for m in range(M)]
    expected = reference(store, train, "gauss_newton", 0.1, loss_gradients).diagonal()
    scorer = fitted(store, loss_gradients=loss_gradients)
    assert_close(scorer.self_scores(), expected)


@pytest.mark.parametrize("largest", [True, False])
def test_top_k_is_the_top_of_the_full_matrix(tmp_path, largest):
    scorer, targets = fitted(make_store(tmp_path)), make_targets()
    full, found = scored(scorer, targets), scored(scorer, targets, top_k=7, largest=largest)
    expected = full.topk(7, largest=largest)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_kernel_and_the_products(tmp_path, world):
    store, targets = make_store(tmp_path, k=1100), make_targets(1100)[0]
    phi = columns(store, 0, "features")
    parts = [kernel_matrix([store], 0, CPU, OneOf(rank, world)) for rank in range(world)]
    assert all(part.any() for part in parts)
    torch.testing.assert_close(sum(parts), phi @ phi.T, rtol=1e-12, atol=1e-12)
    parts = [kernel_module.products_with(store, 0, targets, OneOf(rank, world)) for rank in range(world)]
    torch.testing.assert_close(sum(parts), targets.double() @ phi.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 30])
def test_blocks_of_any_size_give_the_kernel(tmp_path, monkeypatch, rows):
    store = make_store(tmp_path, k=1100)
    monkeypatch.setattr(kernel_module, "_ROWS", rows)
    monkeypatch.setattr(kernel_module, "_STRIP_BYTES", 1000)
    phi = columns(store, 1, "features")
    torch.testing.assert_close(kernel_matrix([store], 1, CPU, Ranks()), phi @ phi.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel_module.products_with(store, 1, phi, Ranks()), phi @ phi.T, rtol=1e-12, atol=1e-12)


def test_the_kernel_is_kept_for_every_curvature(tmp_path, monkeypatch):
    store, made = make_store(tmp_path), []
    real = kernel_matrix
    monkeypatch.setattr("lightning_trak.scoring.newton.dual.kernel_matrix", lambda *a: made.append(a) or real(*a))
    fitted(store)
    assert len(made) == M
    fitted(store, curvature="identity")
    assert len(made) == M
    rows = store.read(1, 2)
    store.write(1, 2, rows._replace(features=rows.features * 2))
    fitted(store)
    assert len(made) == M + 1


def test_no_damping_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Gram matrix of checkpoint 0 \(70 x 70\) is singular.*only 30 training"):
        fitted(make_store(tmp_path), damping=0.0)


def test_too_little_damping_for_the_features_is_refused_in_their_own_unit():
    phi = torch.randn(20, 5, dtype=torch.float64) @ torch.randn(5, 200, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"singular to the precision of its torch.float32 features.*now 1e-07"):
        DampedKernel(phi @ phi.T, torch.ones(20), 1e-7, 200, torch.float32, "checkpoint 0", CPU)


def test_kernels_that_mean_nothing_are_refused():
    for kernel, match in [(torch.zeros(3, 3), "is zero"), (torch.full((3, 3), torch.nan), "not fin")]:
        with pytest.raises(ValueError, match=match):
            DampedKernel(kernel.double(), torch.ones(3), 1.0, 10, torch.float32, "x", CPU)
    with pytest.raises(ValueError, match="is zero"):
        DampedKernel(torch.eye(3).double(), torch.zeros(3), 1.0, 10, torch.float32, "x", CPU)


def test_negative_curvature_is_refused(tmp_path):
    store = make_store(tmp_path, no_curvature=[(4, -0.5)])
    with pytest.raises(ValueError, match=r"second derivative of the loss is negative \(-0.5\)"):
        fitted(store)
    fitted(store, curvature="identity")


def test_the_choice_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("lightning_trak.scoring.newton.dual.rank_zero_info", told.append)
    fitted(make_store(tmp_path))
    assert told == ["TRAK: solves 30 x 30 (examples) instead of 70 x 70 (features), since n is smaller"]
    many = SimpleNamespace(
        num_examples=50_000, require_complete=lambda: None, read_stored=lambda *_: SimpleNamespace(k=16_384)
    )
    assert smaller_scorer(many) is PrimalScorer
    assert "solves 16384 x 16384 (features), with a Gram matrix of 50000 examples" in told[1]


@pytest.mark.slow
def test_trak_without_a_projection(tmp_path):
    train, trainer = make_data(20), make_trainer()
    options = {"projection": IdentityProjection(), "temperature": 1}
    trak = TRAK(make_model(), make_checkpoints(M), tmp_path / "store", **options)
    trak.featurize(trainer, train)
    scores = trak.score(trainer, TARGETS)
    features = [part.features for part in trak.target_features(trainer, TARGETS)]
    store = open_store(trak, trainer)
    assert_close(scores, reference(store, features, "gauss_newton", "auto"))
    batches = trainer.predict(trak.scorer(), torch.utils.data.DataLoader(TARGETS, 4))
    assert_close(torch.cat(batches), scores.double(), 1e-5)
    top = trak.score(trainer, TARGETS, top_k=3)
    assert torch.equal(top.values, scores.topk(3).values)
    own = trak.self_influence(trainer)
    assert_close(own, trak.score(trainer, train).diagonal().double(), 1e-5)
    assert np.isfinite(own.numpy()).all()


@pytest.mark.parametrize("k", [20, 70])
def test_factors_that_do_not_fit_in_memory_are_made_again(tmp_path, k, monkeypatch):
    store, targets = make_store(tmp_path, k=k), [torch.randn(5, k) for _ in range(M)]
    scorer = fitted(store)
    scores, own = scorer.score([scorer.precondition(c, rows) for c, rows in enumerate(targets)]), scorer.self_scores()
    monkeypatch.setattr(trak_module, "_SYSTEM_BYTES", 1)
    scorer = fitted(store)
    assert len(scorer._systems) == 1
    assert torch.equal(scorer.score([scorer.precondition(c, rows) for c, rows in enumerate(targets)]), scores)
    assert torch.equal(scorer.self_scores(), own)
    assert len(scorer._systems) == 1


@pytest.mark.parametrize("k", [40, 70])
def test_blocks_of_targets_are_larger_where_each_makes_factors_again(tmp_path, k, monkeypatch):
    checkpoints = make_checkpoints(3)
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(k), damping=0.1, temperature=1)
    trak.featurize(make_trainer(), TRAIN)
    loader, made, factored = DataLoader(TARGETS, batch_size=5), [], TRAKScorer._factored
    expected = trak.score(make_trainer(), loader)

    def counting(self, checkpoint, ranks):
        made.append(checkpoint)
        return factored(self, checkpoint, ranks)

    monkeypatch.setattr(TRAKScorer, "_factored", counting)
    monkeypatch.setattr(targets_module, "TARGET_BYTES", 1)  # a block for each batch
    assert_close(trak.score(make_trainer(), loader), expected.double(), 1e-5)
    assert made == [0, 1, 2]
    monkeypatch.setattr(trak_module, "_SYSTEM_BYTES", 2 * 8 * min(k, len(TRAIN)) ** 2)  # two of three
    made.clear()
    assert_close(trak.score(make_trainer(), loader), expected.double(), 1e-5)
    assert made == [0, 1, 2, 1, 2]
