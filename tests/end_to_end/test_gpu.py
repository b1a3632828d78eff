"""The same scores on a GPU as on the CPU, for when there is one."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, GradientCosine, GradientDot, TracIn
from lightning_trak.methods import (
    Arnoldi,
    ConjugateGradient,
    EKFACInfluence,
    ExactKernel,
    Explicit,
    InfluenceFunction,
    LiSSA,
)
from lightning_trak.outputs import CausalLMMargin, ClassificationMargin
from lightning_trak.projections import SparseProjection
from tests.causal_texts import CausalNet, loader, make_texts
from tests.lit import make_checkpoints, make_data, make_model, make_trainer, stored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("engine", ["functional", "hooks", "loop"])
def test_scores_on_a_gpu_are_those_on_the_cpu(tmp_path, engine):
    checkpoints = make_checkpoints(2)
    found = {}
    for accelerator in ("cpu", "gpu"):
        trainer = make_trainer(accelerator=accelerator)
        model = make_model()
        trak = TRAK(model, checkpoints, tmp_path / accelerator, projection=SparseProjection(32), engine=engine)
        trak.featurize(trainer, DataLoader(make_data(50), batch_size=16))
        found[accelerator] = trak.score(trainer, make_data(13, seed=1))
        assert next(model.parameters()).device.type == "cpu"
    torch.testing.assert_close(found["gpu"], found["cpu"], rtol=1e-3, atol=1e-4 * float(found["cpu"].abs().max()))


@pytest.mark.parametrize("method", [GradientDot, GradientCosine, TracIn])
def test_methods_score_on_a_gpu_as_on_the_cpu(tmp_path, method):
    options = {"learning_rates": [0.3, 0.1]} if method is TracIn else {}
    method = method(make_model(), make_checkpoints(2), tmp_path, projection=SparseProjection(32), **options)
    loader = DataLoader(make_data(13, seed=1), batch_size=5)
    expected = method.attribute(make_trainer(accelerator="cpu"), make_data(50), loader)
    trainer = make_trainer(accelerator="gpu")
    for found in (method.score(trainer, loader), torch.cat(trainer.predict(method.scorer(), loader))):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["primal", "dual", "exact"])
def test_candidates_and_intervals_on_a_gpu_are_those_on_the_cpu(tmp_path, name):
    options = {} if name == "exact" else {"projection": SparseProjection(32 if name == "primal" else 64)}
    kind = ExactKernel if name == "exact" else TRAK
    method = kind(make_model(), make_checkpoints(2), tmp_path, **options)
    targets, new = make_data(13, seed=1), make_data(7)
    method.featurize(make_trainer(accelerator="cpu"), make_data(50))
    asked = {"train": new, "output": ClassificationMargin(labels="predicted")}
    for question in ({}, {"aggregate": "mean", "train_groups": [0, 0, 0, 1, 1, 1, None], "interval": 0.9}):
        found, expected = (
            method.score(make_trainer(accelerator=accelerator), targets, **asked, **question)
            for accelerator in ("gpu", "cpu")
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize(
    "solver", [Explicit(), ConjugateGradient(tolerance=1e-9), LiSSA(20, tolerance=9.0), Arnoldi(40, 20), None]
)
def test_influence_on_a_gpu_is_that_on_the_cpu(solver):
    model, checkpoints = make_model(), make_checkpoints(2)
    if solver is None:
        method = EKFACInfluence(model, checkpoints, parameters=["first.*", "head.*"])
    else:
        method = InfluenceFunction(model, checkpoints, solver=solver, damping=5.0)
    train, targets = make_data(50), make_data(9, seed=1)
    found, expected = (
        method.attribute(make_trainer(accelerator=accelerator, precision="64-true"), train, targets)
        for accelerator in ("gpu", "cpu")
    )
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [TRAK, GradientCosine])
@pytest.mark.parametrize("dim", [16, 64])
def test_tokens_on_a_gpu_are_those_on_the_cpu(tmp_path, kind, dim):
    """TRAK with fewer features than texts, and with more: the dual."""
    model = CausalNet()
    checkpoints, output = [model.state_dict(), CausalNet(1).state_dict()], CausalLMMargin(per_token=True)
    method, targets = (
        kind(model, checkpoints, tmp_path, projection=SparseProjection(dim)),
        loader(make_texts(3, seed=1)),
    )
    method.featurize(make_trainer(accelerator="cpu"), loader(make_texts(24)))
    found = {}
    for accelerator in ("cpu", "gpu"):
        trainer = make_trainer(accelerator=accelerator)
        parts = method.score_tokens(trainer, targets, [(0, 3), (2, 3), (2, 20)])
        found[accelerator] = torch.cat([part.scores for part in parts]), method.score(trainer, targets, output=output)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("dtype", ["int4", "int8", "float16"])
def test_rounded_features_on_a_gpu_are_those_on_the_cpu(tmp_path, dtype):
    found = {}
    for accelerator in ("cpu", "gpu"):
        trak = TRAK(make_model(), make_checkpoints(1), tmp_path / accelerator, dtype=dtype)
        trak.featurize(make_trainer(accelerator=accelerator), DataLoader(make_data(1200), batch_size=100))
        store = stored(tmp_path / accelerator)
        found[accelerator] = torch.cat([store.read(0, shard).features for shard in range(store.num_shards)]).float()
    # A number between two levels may be rounded to either of them.
    assert (found["gpu"] - found["cpu"]).norm() <= 1e-2 * found["cpu"].norm()


@pytest.mark.parametrize("kind", [TRAK, InfluenceFunction])
def test_examples_that_are_not_finite_are_named(tmp_path, kind):
    model, (inputs, labels) = make_model(), make_data(50).tensors
    inputs = inputs.clone()
    inputs[7, 2] = torch.nan
    options = {"store": tmp_path} if kind is TRAK else {"solver": Explicit()}
    method = kind(model, [model.state_dict()], **options)
    with pytest.raises(ValueError, match=r"example 7 at checkpoint 0 .* is not finite"):
        method.attribute(make_trainer(accelerator="gpu"), TensorDataset(inputs, labels), make_data(3))
