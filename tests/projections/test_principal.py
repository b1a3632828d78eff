"""Principal axes: of the right subspace, from the data, the same however the data come."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection, KroneckerProjection
from lightning_trak.projections.principal import PrincipalAxes
from tests.lit import stored


def matrices(length=60, columns=9, count=30, decay=0.6):
    """Matrices whose columns lie mostly along a few directions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(length, length, generator=generator)).Q
    scales = decay ** torch.arange(length)
    return basis @ (scales[:, None] * torch.randn(count, length, columns, generator=generator))


def axes_of(batches, width, length=60):
    def signs(columns):
        return torch.randn(length, columns, generator=torch.Generator().manual_seed(1)).sign()

    axes = PrincipalAxes(width, signs, length)
    for batch in batches:
        axes.update(batch)
    return axes.compute()


def test_the_axes_span_the_leading_eigenvectors():
    data = matrices()
    exact = torch.linalg.eigh((data @ data.mT).sum(0).double()).eigenvectors[:, -4:]
    found = axes_of([data], 4).double()
    torch.testing.assert_close(found.T @ found, torch.eye(4).double(), atol=1e-5, rtol=0)
    assert torch.linalg.svdvals(exact.T @ found).min() > 0.999
    assert torch.equal(found.max(0).values, found.abs().max(0).values)  # the largest entry of each is positive


def test_the_axes_do_not_depend_on_the_batches():
    data = matrices()
    torch.testing.assert_close(axes_of([data], 4), axes_of(data.split(7), 4), atol=1e-4, rtol=0)


def test_gradients_of_low_rank_and_zeros_have_axes():
    vector = torch.randn(1, 60, 1, generator=torch.Generator().manual_seed(2))
    found = axes_of([vector], 4)
    torch.testing.assert_close(found[:, 0].abs(), (vector / vector.norm()).flatten().abs(), atol=1e-4, rtol=0)
    assert axes_of([torch.zeros(3, 60, 2)], 4).isfinite().all()


@pytest.mark.parametrize("length", [10, 60])  # the sketch is as wide as the matrices, or narrower
@pytest.mark.parametrize("seed", range(5))
def test_gradients_that_sum_to_zero_have_axes(length, seed):
    """As those of logits do: the matrix whose axes are sought is singular, and known with rounding errors."""
    generator = torch.Generator().manual_seed(seed)
    scales = 3 * torch.randn(512, 1, 1, generator=generator)
    data = torch.randn(512, 10, 64, generator=generator) * scales.exp()
    data -= data.mean(1, keepdim=True)
    data = torch.cat([data, torch.zeros(512, length - 10, 64)], 1)
    found = axes_of(data.split(100), 8, length).double()
    exact = torch.linalg.eigh(torch.einsum("bij,bkj->ik", data.double(), data.double())).eigenvectors[:, -8:]
    assert torch.linalg.svdvals(exact.T @ found).min() > 0.999


def featurized(tmp_path, name, projection, batch_size=16, engine="auto"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 3))
    data = TensorDataset(torch.randn(96, 20) * 0.7 ** torch.arange(20), torch.randint(3, (96,)))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trak = TRAK(
        model,
        [model.state_dict()],
        tmp_path / name,
        output=ClassificationMargin(),
        projection=projection,
        damping=0.3,
        engine=engine,
    )
    trak.featurize(trainer, DataLoader(data, batch_size=batch_size))
    return trak, trainer, data


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hooks", "functional", "loop"])
def test_scores_do_not_depend_on_engine_or_batch_size(tmp_path, engine):
    def scores(name, **options):
        projection = KroneckerProjection(6, 6, axes="principal", sample=64)
        trak, trainer, data = featurized(tmp_path, name, projection, **options)
        return trak.score(trainer, DataLoader(data, batch_size=16))

    first, second = scores("first"), scores("second", batch_size=7, engine=engine)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max()))


def test_they_keep_inner_products_better_than_random_ones(tmp_path):
    def products(name, projection):
        featurized(tmp_path, name, projection)
        store = stored(tmp_path / name)
        features = torch.cat([store.read(0, shard).features for shard in range(store.num_shards)])
        return features @ features.T

    exact = products("exact", IdentityProjection())
    random = products("random", KroneckerProjection(5, 5))
    principal = products("principal", KroneckerProjection(5, 5, axes="principal"))
    assert (principal - exact).norm() < 0.3 * (random - exact).norm()


def test_they_must_be_found_first():
    bound = KroneckerProjection(2, 2, axes="principal").bind({"w": (5, 5)}, 0, 0, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="call `fit`"):
        bound.add_(torch.zeros(1, bound.dim), "w", torch.ones(1, 25))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="axes must be one of 'random', 'principal'; got"):
        KroneckerProjection(axes="pca")
