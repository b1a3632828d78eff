"""Principal features: the leading directions of the landmarks, the same however the data come."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.gradients import HookEngine
from lightning_trak.outputs import ClassificationMargin, RegressionOutput
from lightning_trak.projections import IdentityProjection, PrincipalProjection, SampleBatch, SparseProjection
from lightning_trak.projections.landmarks import Landmarks
from tests import lit
from tests.lit import make_trainer, open_store

CPU = torch.device("cpu")
SMALL = PrincipalProjection(12, landmarks=20, sample=60, sketch=64)


def gradients(count=40, dim=30, scale=1.0):
    """Gradients that lie mostly along a few directions, with curvatures from small to large."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    rows = torch.randn(count, dim, generator=generator) * 0.7 ** torch.arange(dim) @ basis.T
    return rows * scale, torch.randn(count, generator=generator).mul(2).exp()


def basis_of(rows, curvatures, width, count=40, batch=40, share=0.3):
    landmarks = Landmarks(count, rows.shape[1], CPU)
    loss_gradients = (share * curvatures).sqrt()  # Q^2 is a share of R
    for parts in zip(rows.split(batch), curvatures.split(batch), loss_gradients.split(batch), strict=True):
        landmarks.update(*parts)
    return landmarks.basis(width)


def leading(rows, curvatures, width, ridge):
    """The projector onto the leading v of sum_i sqrt(R_i) s_i s_i^T v = mu (sum_i R_i s_i s_i^T + ridge) v."""
    rows, curvatures = rows.double(), curvatures.double()
    values, vectors = torch.linalg.eigh(rows.T @ (rows * curvatures[:, None]))
    whitening = vectors * (values + ridge).rsqrt() @ vectors.T
    influence = whitening @ rows.T @ (rows * curvatures.sqrt()[:, None]) @ whitening
    found = torch.linalg.qr(whitening @ torch.linalg.eigh(influence).eigenvectors[:, -width:]).Q
    return found @ found.T


def ridge_of(rows, curvatures, share=0.3):
    weights = curvatures.double() * rows.double().square().sum(1)
    return share * weights.square().sum() / weights.sum()


@pytest.mark.parametrize("scale", [1.0, 1e-15])  # squares of the latter are no float32 numbers
@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize("count", [10, 40])
def test_the_basis_holds_the_leading_directions_of_the_examples_that_weigh_most(count, batch, scale):
    rows, curvatures = gradients(scale=scale)
    best = (curvatures.sqrt() * rows.double().square().sum(1)).argsort(descending=True)[:count]
    found = basis_of(rows, curvatures * scale, 6, count, batch).double()
    plain = rows / scale
    expected = leading(plain[best], curvatures[best], 6, ridge_of(plain, curvatures))
    torch.testing.assert_close(found @ found.T, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(6).double(), atol=1e-6, rtol=0)
    assert torch.equal(found.max(0).values, found.abs().max(0).values)  # the largest entry of each is positive


def test_directions_of_a_constant_curvature_are_the_leading_eigenvectors():
    """Whatever Q is: there is nothing to learn from it."""
    rows, _ = gradients()
    vectors = torch.linalg.eigh(rows.double().T @ rows.double()).eigenvectors[:, -6:]
    found = [basis_of(rows, torch.full((40,), 2.0), 6, share=share).double() for share in (0.02, 5)]
    for each in found:
        torch.testing.assert_close(each @ each.T, vectors @ vectors.T, atol=1e-5, rtol=0)
    assert torch.equal(*found)


def test_fewer_directions_than_asked_for_leave_zeros():
    rows, curvatures = gradients(count=3)
    found = basis_of(torch.cat([rows, rows, torch.zeros(4, 30)]), torch.cat([curvatures, curvatures, torch.ones(4)]), 8)
    assert not found[:, 3:].any()
    torch.testing.assert_close(rows @ found @ found.T, rows, atol=1e-5, rtol=0)
    assert not basis_of(torch.zeros(4, 30), torch.ones(4), 8).any()


def test_examples_without_curvature_add_nothing_unless_there_are_no_others():
    rows, curvatures = gradients()
    curvatures[5:] = 0
    expected = leading(rows[:5], curvatures[:5], 3, ridge_of(rows, curvatures))
    found = basis_of(rows, curvatures, 3).double()
    torch.testing.assert_close(found @ found.T, expected, atol=1e-5, rtol=0)
    flat = torch.zeros(40)
    longest = rows.norm(dim=1).argsort(descending=True)[:10]
    found = basis_of(rows, flat, 6, count=10).double()
    vectors = torch.linalg.eigh(rows[longest].double().T @ rows[longest].double()).eigenvectors[:, -6:]
    torch.testing.assert_close(found @ found.T, vectors @ vectors.T, atol=1e-5, rtol=0)


class Sample(SampleBatch):
    """Given gradients of the parameters a and b."""

    def __init__(self, rows, curvatures):
        self.rows, self.curvatures = rows, curvatures

    def gradients(self):
        yield {"a": self.rows[:, :12], "b": self.rows[:, 12:]}

    def project(self, projection):
        return projected(self.rows, projection), (0.3 * self.curvatures).sqrt(), self.curvatures


def projected(rows, projection):
    features = torch.zeros(len(rows), projection.dim, dtype=rows.dtype)
    projection.add_(features, "a", rows[:, :6])
    projection.add_(features, "b", rows[:, 6:18], range(3))
    projection.add_(features, "b", rows[:, 18:], range(3, 6))
    return features


def fitted(projection, rows, curvatures):
    bound = projection.bind({"a": (6,), "b": (6, 2, 2)}, 0, 0, CPU)
    bound.set_fit(bound.fit([Sample(*parts) for parts in zip(rows.split(9), curvatures.split(9), strict=True)]))
    return bound


@pytest.mark.parametrize("sketch", [16, 64])  # shorter than a gradient, and longer, so that none is needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_the_basis_times_the_sketch(sketch, dtype):
    rows, curvatures = gradients()
    projection = PrincipalProjection(6, landmarks=20, sample=40, sketch=sketch)
    bound = fitted(projection, rows, curvatures)
    inner = IdentityProjection() if sketch == 64 else SparseProjection(sketch)
    sketches = projected(rows, inner.bind({"a": (6,), "b": (6, 2, 2)}, 0, 0, CPU))
    expected = sketches @ basis_of(sketches, curvatures, 6, 20).bfloat16().float()
    rows = rows.to(dtype)
    features = bound.finish(projected(rows, bound.sketch))
    torch.testing.assert_close(features, expected.to(dtype), atol=1e-2, rtol=1e-2)  # the basis is rounded
    torch.testing.assert_close(projected(rows, bound), features)  # without the short cut


def test_it_must_be_fitted_first():
    bound = PrincipalProjection(2, landmarks=2, sample=2, sketch=4).bind({"w": (5, 5)}, 0, 0, CPU)
    with pytest.raises(RuntimeError, match="call `fit`"):
        bound.finish(torch.ones(1, 4))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "`dim` to be a positive integer but got 0"),
        ({"sketch": 2.5}, "`sketch` to be a positive integer but got 2.5"),
        ({"landmarks": True}, "`landmarks` to be a positive integer but got True"),
        ({"dim": 64, "landmarks": 32}, "`dim` to be at most `landmarks`=32 but got dim=64"),
        ({"sample": 100}, "`landmarks` to be at most `sample`=100 but got landmarks="),
        ({"sketch": 100}, "`dim` to be at most `sketch`=100 but got dim="),
    ],
)
def test_values_that_make_no_sense_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        PrincipalProjection(**options)


# With a model


class Scale(nn.Module):
    """Hooks do not know this layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, inputs):
        return inputs * self.scale


def make_trak(directory, projection, *more, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3), *more)
    options = {"output": ClassificationMargin()} | options
    return TRAK(model, [model.state_dict()], directory, projection=projection, **options)


def make_train(count=60):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(count, 20) * 0.8 ** torch.arange(20), torch.randint(3, (count,)))


def scores(directory, projection, *more, batch_size=16, train=None, **options):
    trak = make_trak(directory, projection, *more, **options)
    train = make_train() if train is None else train
    return trak.attribute(make_trainer(), DataLoader(train, batch_size=batch_size), make_train(5))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [60, 9])
def test_with_a_basis_of_all_training_gradients_nothing_is_lost(tmp_path, size):
    """Scores are inner products with training gradients, and those are in the span of the basis."""
    train = make_train(size)
    whole = PrincipalProjection(64, landmarks=64, sample=64, sketch=1024)
    expected = scores(tmp_path / "exact", IdentityProjection(), train=train)
    found = scores(tmp_path / "principal", whole, train=train)
    assert (found - expected).norm() < 0.01 * expected.norm()  # the basis is rounded to bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hooks", "functional", "loop"])
def test_scores_do_not_depend_on_engine_or_batch_size(tmp_path, engine):
    expected = scores(tmp_path / "one", SMALL)
    close(scores(tmp_path / "two", SMALL, batch_size=7, engine=engine), expected)


@pytest.mark.slow
def test_hooks_and_vmap_together(tmp_path):
    expected = scores(tmp_path / "one", SMALL, Scale(), engine="loop")
    close(scores(tmp_path / "two", SMALL, Scale(), engine="hooks"), expected)


def test_the_faster_process_decides(tmp_path, monkeypatch):
    """Eigenvectors of nearly equal eigenvalues turn with rounding, so two processes must not use their own."""
    fit, found = FeatureExtractor.fit_projection, {}

    def slower(self, batches):
        found.update(fit(self, batches))
        other = open_store(trak, make_trainer())
        other.settle_extra(0, "projection", {"basis": found["basis"].flip(1)}, other.key)
        return found

    trak = make_trak(tmp_path, SMALL)
    monkeypatch.setattr(FeatureExtractor, "fit_projection", slower)
    trak.featurize(make_trainer(), DataLoader(make_train(), batch_size=16))
    monkeypatch.undo()
    make_trak(tmp_path / "mine", SMALL).featurize(make_trainer(), DataLoader(make_train(), batch_size=16))
    mine, theirs = (stored(directory) for directory in (tmp_path / "mine", tmp_path))
    torch.testing.assert_close(theirs, mine.flip(1))


def stored(directory):
    return lit.stored(directory).read(0, 0).features


@pytest.mark.slow
def test_an_engine_that_was_wrong_leaves_no_basis(tmp_path, monkeypatch):
    """It is found when the first shard is audited, after the fit."""
    right, limit = HookEngine.project, make_train().tensors[0][:2, 0].max()  # the first two choose the engine

    def project(self, batch, projection, features):
        values = right(self, batch, projection, features)
        features[batch.content[0][:, 0] > limit] *= 2
        return values

    train = DataLoader(make_train(), batch_size=16)
    make_trak(tmp_path / "right", SMALL, engine="functional").featurize(make_trainer(), train, shard_size=8)
    monkeypatch.setattr(HookEngine, "project", project)
    with pytest.warns(UserWarning, match="engine 'hooks' cannot differentiate"):
        make_trak(tmp_path / "wrong", SMALL).featurize(make_trainer(), train, shard_size=8)
    assert torch.equal(stored(tmp_path / "wrong"), stored(tmp_path / "right"))


def test_a_loss_without_curvature_gets_the_largest_gradients_and_a_warning(tmp_path):
    class Linear(ClassificationMargin):
        def loss(self, output):
            return -output

    trak = make_trak(tmp_path, SMALL, output=Linear(), curvature="identity")
    with pytest.warns(UserWarning, match="no curvature .* all examples weigh alike"):
        trak.featurize(make_trainer(), DataLoader(make_train(), batch_size=16))
    assert stored(tmp_path).any(0).all()


def test_a_loss_that_is_not_convex_is_refused(tmp_path):
    class Concave(RegressionOutput):
        def output(self, module, batch):
            return module(batch[0])[:, 0]

        def loss(self, output):
            return -(output**2)

    with pytest.raises(ValueError, match=r"is negative \(-2\) .* use SparseProjection"):
        make_trak(tmp_path, SMALL, output=Concave()).featurize(make_trainer(), make_train())


def test_an_example_that_is_not_finite_is_named(tmp_path):
    train = make_train()
    train.tensors[0][17, 3] = torch.nan
    with pytest.raises(ValueError, match=r"example 17 at checkpoint 0 .* is not finite"):
        make_trak(tmp_path, SMALL).featurize(make_trainer(), train)


def test_a_projection_is_not_fitted_to_nothing(tmp_path):
    train = make_train()
    train.tensors[0][:] = torch.nan
    with pytest.raises(ValueError, match="to which the projection is fitted, are all not finite"):
        make_trak(tmp_path, SMALL).featurize(make_trainer(), train)
    assert not list(tmp_path.rglob("projection*"))
