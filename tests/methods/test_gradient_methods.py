"""Gradient dot, gradient cosine and TracIn: against autograd and against real steps of gradient descent."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, GradientCosine, GradientDot, TracIn
from lightning_trak.methods import FeatureMethod, Method
from lightning_trak.outputs import ClassificationMargin, RegressionOutput
from lightning_trak.projections import IdentityProjection, SparseProjection
from tests.lit import TARGETS, TRAIN, attribute, make_data, make_model, make_trainer

RATES = [0.3, 0.1]
EXACT = {"projection": IdentityProjection(), "dtype": torch.float64}
METHODS = {
    "dot": (GradientDot, {}),
    "TracIn": (TracIn, {"learning_rates": RATES}),
    "cosine": (GradientCosine, {}),
    "GAS": (GradientCosine, {"learning_rates": RATES}),
}


def double(data: TensorDataset) -> TensorDataset:
    return TensorDataset(*(part.double() if part.is_floating_point() else part for part in data.tensors))


def per_example_loss(kind, module, inputs, labels):
    """As a user would write it."""
    predictions = module(inputs)
    if kind == "classes":
        return F.cross_entropy(predictions, labels, reduction="none")
    return 0.5 * (predictions.squeeze(-1) - labels) ** 2


def task(kind):
    """A module in float64, its output, weights of two checkpoints, training data and targets."""
    data, targets = double(make_data(23)), double(make_data(7, seed=1))
    if kind == "classes":
        return make_model().double().eval(), ClassificationMargin(), [make_model(seed=s) for s in (1, 2)], data, targets
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double() for _ in range(3)]
    data, targets = (TensorDataset(part.tensors[0], part.tensors[0].sum(1)) for part in (data, targets))
    return modules[0], RegressionOutput(), modules[1:], data, targets


def gradients(scalars, module):
    """(examples, parameters), one by one."""
    rows = [torch.autograd.grad(scalar, list(module.parameters()), retain_graph=True) for scalar in scalars]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("effect_on", ["loss", "output"])
@pytest.mark.parametrize("kind", ["classes", "numbers"])
@pytest.mark.parametrize("name", METHODS)
def test_scores_are_the_formula(tmp_path, name, kind, effect_on):
    module, output, checkpoints, data, targets = task(kind)
    weights = RATES if name in ("TracIn", "GAS") else [0.5, 0.5]
    expected = torch.zeros(len(targets), len(data), dtype=torch.float64)
    for weight, checkpoint in zip(weights, checkpoints, strict=True):
        module.load_state_dict(checkpoint.state_dict())
        train = -gradients(per_example_loss(kind, module, *data.tensors), module)
        aim = -per_example_loss(kind, module, *targets.tensors)
        aim = gradients(aim if effect_on == "loss" else output.output(module, list(targets.tensors)), module)
        if name in ("cosine", "GAS"):
            train, aim = F.normalize(train), F.normalize(aim)
        expected += weight * aim @ train.T
    states = [checkpoint.state_dict() for checkpoint in checkpoints]
    method, options = METHODS[name]
    method = method(module, states, tmp_path, output=output, effect_on=effect_on, **options, **EXACT)
    assert isinstance(method, FeatureMethod)
    assert isinstance(method, Method)
    scores = method.attribute(make_trainer(), DataLoader(data, batch_size=4), targets)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_sign_is_that_of_a_step_of_gradient_descent(tmp_path, kind):
    """Train on one example for one small step, and see what became of the targets."""
    module, output, (checkpoint, _), data, targets = task(kind)
    module.load_state_dict(checkpoint.state_dict())
    step = 1e-7
    before = per_example_loss(kind, module, *targets.tensors), output.output(module, list(targets.tensors))
    lowered, raised = [], []
    for i in range(len(data)):
        trained = copy.deepcopy(module)
        optimizer = torch.optim.SGD(trained.parameters(), lr=step)
        per_example_loss(kind, trained, *(part[i : i + 1] for part in data.tensors)).sum().backward()
        optimizer.step()
        lowered.append(before[0] - per_example_loss(kind, trained, *targets.tensors))
        raised.append(output.output(trained, list(targets.tensors)) - before[1])
    if kind == "numbers":
        assert 0 < int((before[1] > 0).sum()) < len(targets), (
            "the loss must rise with some outputs and fall with others"
        )
    for effect_on, seen in (("loss", lowered), ("output", raised)):
        method = TracIn(
            module,
            [module.state_dict()],
            tmp_path,
            output=output,
            learning_rates=step,
            effect_on=effect_on,
            **EXACT,
        )
        scores = method.attribute(make_trainer(), data, targets)
        seen = torch.stack(seen, dim=1).detach()
        torch.testing.assert_close(scores, seen, rtol=1e-4, atol=1e-4 * float(seen.abs().mean()))


@pytest.mark.slow
def test_all_methods_share_a_store(tmp_path, checkpoints, expected, monkeypatch):
    attribute(tmp_path, checkpoints)  # TRAK's
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard*")}
    for name, (method, options) in METHODS.items():
        shared, own = (
            method(make_model(), checkpoints, tmp_path / place, projection=SparseProjection(32), **options)
            for place in ("store", name)
        )
        with monkeypatch.context() as patched:
            patched.setattr("lightning_trak.features.extractor.FeatureExtractor.__call__", None)
            shared.featurize(make_trainer(), TRAIN)
        assert torch.equal(shared.score(make_trainer(), TARGETS), own.attribute(make_trainer(), TRAIN, TARGETS))
    assert {path: path.stat().st_mtime_ns for path in files} == files
    trak = TRAK(make_model(), checkpoints, tmp_path / "GAS", projection=SparseProjection(32))
    assert torch.equal(trak.attribute(make_trainer(), TRAIN, TARGETS), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_blocks_batches_top_k_and_scorer_agree(tmp_path, checkpoints, name, monkeypatch):
    method, options = METHODS[name]
    method = method(make_model(), checkpoints, tmp_path, projection=SparseProjection(32), **options)
    trainer = make_trainer()
    method.featurize(trainer, DataLoader(TRAIN, batch_size=4, shuffle=True), shard_size=8)
    scores = method.score(trainer, TARGETS)
    assert scores.shape == (13, 50)
    assert scores.dtype == torch.float32
    parts = trainer.predict(method.scorer(), DataLoader(TARGETS, batch_size=5))
    torch.testing.assert_close(torch.cat(parts), scores, rtol=1e-5, atol=1e-6)
    top = method.score(trainer, TARGETS, top_k=4, largest=False)
    torch.testing.assert_close(top.values, scores.topk(4, largest=False).values)
    assert torch.equal(top.indices, scores.topk(4, largest=False).indices)
    monkeypatch.setattr("lightning_trak.scoring.targets.TARGET_BYTES", 3 * 32 * 4 * 2)
    blocks = method.score(trainer, DataLoader(TARGETS, batch_size=3))
    torch.testing.assert_close(blocks, scores, rtol=1e-5, atol=1e-6)


def test_projected_cosines_are_near_the_true_ones(tmp_path, checkpoints):
    true, estimated = (
        GradientCosine(make_model(), checkpoints, tmp_path / name, projection=projection).attribute(
            make_trainer(), TRAIN, TARGETS
        )
        for name, projection in (("true", IdentityProjection()), ("estimated", SparseProjection(1024)))
    )
    assert float((true - estimated).abs().max()) < 0.15  # 1 / sqrt(2 * 1024) each, 650 of them
    assert float(true.abs().max()) > 0.9


@pytest.mark.parametrize("name", METHODS)
def test_bad_options_are_refused(tmp_path, checkpoints, name):
    method, options = METHODS[name]
    with pytest.raises(ValueError, match="effect_on must be one of 'loss', 'output'; got 'margin'"):
        method(make_model(), checkpoints, tmp_path, effect_on="margin", **options)
    with pytest.raises(ValueError, match="dtype must be one of"):
        method(make_model(), checkpoints, tmp_path, dtype=torch.int8, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'curvature'"):
        method(make_model(), checkpoints, tmp_path, curvature="identity", **options)


def test_a_store_made_otherwise_is_refused_by_name(tmp_path, checkpoints):
    attribute(tmp_path, checkpoints)
    method = GradientDot(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32), seed=1)
    with pytest.raises(ValueError, match="was made with seed 0, this GradientDot has seed 1"):
        method.featurize(make_trainer(), TRAIN)


def test_attribute_takes_one_set_of_targets(tmp_path, checkpoints):
    method = GradientDot(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    loaders = [DataLoader(TARGETS), DataLoader(TARGETS)]
    with pytest.raises(ValueError, match="expected one set of targets, got 2 loaders; join them"):
        method.attribute(make_trainer(), TRAIN, loaders)

    class Several(L.LightningDataModule):
        def predict_dataloader(self):
            return loaders

    with pytest.raises(ValueError, match="expected one set of targets, got 2 loaders"):
        method.attribute(make_trainer(), TRAIN, Several())
    assert not any(tmp_path.iterdir())
    scores = method.attribute(make_trainer(), TRAIN, (loaders[0],))
    for found in method.score(make_trainer(), loaders):
        assert torch.equal(found, scores)
    assert len(method.score(make_trainer(), loaders)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "TRAK"])
def test_self_influence_is_the_diagonal(tmp_path, checkpoints, name):
    method, options = METHODS.get(name, (TRAK, {}))
    method = method(make_model(), checkpoints, tmp_path, projection=SparseProjection(32), **options)
    trainer = make_trainer()
    with pytest.raises(FileNotFoundError):
        method.self_influence(trainer)
    method.featurize(trainer, DataLoader(TRAIN, batch_size=4), shard_size=8)
    found = method.self_influence(trainer)
    torch.testing.assert_close(found, method.score(trainer, TRAIN).diagonal(), rtol=1e-4, atol=1e-6)
