"""TracIn's learning rates, from the manifest of snapshots or the user; the last layer."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import GradientCosine, TracIn, TRAKCallback
from lightning_trak.checkpoints.series import ParameterGroup, SnapshotSeries
from lightning_trak.gradients import last_layer
from lightning_trak.projections import IdentityProjection, SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_model, make_trainer


class Scheduled(LitNet):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]


def make_series(directory, *groups_of_snapshots):
    series = SnapshotSeries(directory)
    series.open()
    for step, groups in enumerate(groups_of_snapshots):
        series.save(make_model(seed=step).state_dict(), step + 1, 0, groups)
    return directory


def group(lr, optimizer=0, parameters=()):
    return ParameterGroup(optimizer, "SGD", lr, 0.0, parameters)


def test_those_of_a_real_run_are_used(tmp_path):
    model = Scheduled()
    callback = TRAKCallback(tmp_path / "snapshots")
    trainer = make_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(model, DataLoader(TRAIN, batch_size=25))
    options = {"projection": SparseProjection(32)}
    found = TracIn(model, tmp_path / "snapshots", tmp_path / "store", **options)
    assert found.checkpoint_weights == pytest.approx([0.5, 0.05, 0.005])
    cosine = GradientCosine(model, tmp_path / "snapshots", tmp_path / "store", learning_rates="snapshots", **options)
    assert cosine.checkpoint_weights == found.checkpoint_weights
    scores = found.attribute(make_trainer(), TRAIN, TARGETS)
    files = sorted((tmp_path / "snapshots").glob("*.safetensors"))
    given = TracIn(model, files, tmp_path / "store", learning_rates=[0.5, 0.05, 0.005], **options)
    torch.testing.assert_close(given.score(make_trainer(), TARGETS), scores)
    other = TracIn(model, files, tmp_path / "store", learning_rates=0.5, **options)
    assert not torch.allclose(other.score(make_trainer(), TARGETS), scores)


def test_groups_of_one_rate_are_one(tmp_path):
    series = make_series(tmp_path / "s", [group(0.1), group(0.1)], [group(0.2), group(0.2, optimizer=1)])
    assert TracIn(make_model(), series, tmp_path).checkpoint_weights == [0.1, 0.2]
    twice = TracIn(make_model(), [series, series], tmp_path)
    assert twice.checkpoint_weights == [0.1, 0.2, 0.1, 0.2]


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (
            [group(0.1), group(0.02)],
            r"parameter groups of s/snapshot-00000002\.safetensors had learning rates 0\.02, 0\.1, and .*"
            r" pass learning_rates=.* selected parameters",
        ),
        ([group(None)], "optimizer that has no learning rate: pass learning_rates="),
        ([], "optimizer that has no learning rate"),
    ],
)
def test_rates_that_cannot_be_known_are_refused(tmp_path, groups, match):
    series = make_series(tmp_path / "s", [group(0.1)], groups)
    with pytest.raises(ValueError, match=match):
        TracIn(make_model(), series, tmp_path)
    assert TracIn(make_model(), series, tmp_path, learning_rates=[0.1, 0.1]).checkpoint_weights == [0.1, 0.1]


class TwoRates(LitNet):
    def configure_optimizers(self):
        rest = [parameter for name, parameter in self.named_parameters() if not name.startswith("head.")]
        groups = [{"params": rest}, {"params": self.head.parameters(), "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]


def test_a_tracin_for_each_rate_adds_up_to_that_of_all(tmp_path):
    trainer = make_trainer(max_epochs=2, callbacks=[TRAKCallback(tmp_path / "snapshots")])
    trainer.fit(TwoRates(), DataLoader(TRAIN, batch_size=25))
    options = {"projection": IdentityProjection()}
    with pytest.raises(
        ValueError,
        match=r"several learning rates at snapshots/snapshot-00000002\.saf.*: 0\.02 \(head\.weight, head\.bias\)"
        r"; 0\.5 \(first\.weight, first\.bias, norm\.weight and 1 more\)\. .* one TracIn for .* by parameters=",
    ):
        TracIn(TwoRates(), tmp_path / "snapshots", tmp_path / "all", **options)
    names = [name for name, _ in TwoRates().named_parameters()]
    methods = {
        part: TracIn(TwoRates(), tmp_path / "snapshots", tmp_path / part, parameters=selected, **options)
        for part, selected in {"head": "head.*", "rest": [name for name in names if name[:4] != "head"]}.items()
    }
    assert methods["head"].checkpoint_weights == pytest.approx([0.02, 0.002])
    assert methods["rest"].checkpoint_weights == pytest.approx([0.5, 0.05])
    found = sum(method.attribute(make_trainer(), TRAIN, TARGETS) for method in methods.values())

    expected = torch.zeros(len(TARGETS), len(TRAIN))
    for file, decay in zip(sorted((tmp_path / "snapshots").glob("*.safetensors")), (1.0, 0.1), strict=True):
        model = TwoRates().eval()
        model.load_state_dict(load_file(file))
        weights = [decay * (0.02 if name[:4] == "head" else 0.5) for name in names]
        gradients = [
            [torch.autograd.grad(model.training_step((x[None], y[None])), list(model.parameters())) for x, y in data]
            for data in (TARGETS, TRAIN)
        ]
        for row, target in enumerate(gradients[0]):
            for column, example in enumerate(gradients[1]):
                products = (w * (a * b).sum() for w, a, b in zip(weights, target, example, strict=True))
                expected[row, column] += sum(products)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_rates_of_selected_parameters_that_were_not_trained_are_refused(tmp_path):
    groups = [group(0.1, parameters=("first.weight", "head.weight")), group(0.02, 1, ("norm.weight", "head.weight"))]
    series = make_series(tmp_path / "s", groups)
    assert TracIn(make_model(), series, tmp_path, parameters="first.weight").checkpoint_weights == [0.1]
    for selected, said in (
        ("head.weight", r"0\.02 and 0\.1 \(head"),
        ("first.*", r"none \(first\.bias\); 0\.1 \(first\.w"),
    ):
        with pytest.raises(ValueError, match=f"had several learning rates at .*: {said}"):
            TracIn(make_model(), series, tmp_path, parameters=selected)


@pytest.mark.parametrize(
    ("rates", "match"),
    [
        ("snapshots", "no learning rate is known of state dict 0: pass learning_rates=, one number for each checkp"),
        ("manifest", "learning_rates must be numbers or 'snapshots'; got 'manifest'"),
        ([0.1], "expected one learning rate for each of 2 checkpoints, got 1"),
        ([0.1, -0.1], r"must be finite, at least 0 and not all 0; got \[0\.1, -0\.1\]"),
        ([0.1, float("nan")], "must be finite"),
        (0.0, r"not all 0; got \[0\.0, 0\.0\]"),
    ],
)
@pytest.mark.parametrize("method", [TracIn, GradientCosine])
def test_bad_rates_are_refused(tmp_path, checkpoints, method, rates, match):
    with pytest.raises(ValueError, match=match):
        method(make_model(), checkpoints, tmp_path, learning_rates=rates)
    with pytest.raises(ValueError, match="no learning rate is known of state dict 0"):
        TracIn(make_model(), checkpoints, tmp_path)


def test_the_last_layer(tmp_path, checkpoints):
    assert last_layer(make_model()) == ["head.weight", "head.bias"]
    options = {"learning_rates": 0.1, "projection": IdentityProjection()}
    found, named = (
        TracIn(make_model(), checkpoints, tmp_path / name, parameters=parameters, **options)
        for name, parameters in (("found", last_layer(make_model())), ("named", "head.*"))
    )
    assert torch.equal(found.attribute(make_trainer(), TRAIN, TARGETS), named.attribute(make_trainer(), TRAIN, TARGETS))


def test_the_last_layer_of_unusual_models():
    tied = nn.ModuleDict({"tokens": nn.Embedding(7, 3), "mix": nn.Linear(3, 3), "head": nn.Linear(3, 7, bias=False)})
    tied["head"].weight = tied["tokens"].weight
    assert last_layer(tied) == ["tokens.weight"]
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    assert last_layer(frozen) == ["1.weight", "1.bias"]
    frozen[1].requires_grad_(False)
    assert last_layer(frozen) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        last_layer(frozen.requires_grad_(False))
