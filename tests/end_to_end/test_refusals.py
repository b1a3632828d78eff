"""Bad input is a clear error, and nothing on disk is lost."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Subset,
    TensorDataset,
)

from lightning_trak import TRAK, AttributionMixin
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods import Explicit, InfluenceFunction
from lightning_trak.outputs import ClassificationMargin, NegativeLoss
from lightning_trak.projections import GaussianProjection, IdentityProjection, SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, attribute, make_data, make_model, make_trainer


def test_a_bad_example_is_named_and_good_shards_are_kept(tmp_path, checkpoints):
    inputs, labels = (tensor.clone() for tensor in TRAIN.tensors)
    inputs[37, 2] = torch.inf
    trak = TRAK(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32))
    with pytest.raises(ValueError, match=r"feature of example 37 at checkpoint 0 \(.*\) is not finite"):
        trak.featurize(make_trainer(), DataLoader(TensorDataset(inputs, labels), batch_size=5), shard_size=10)
    written = sorted(path.name for path in (tmp_path / "store").rglob("shard*"))
    assert written == [f"shard-0000{number}.safetensors" for number in (0, 0, 1, 1, 2, 2, 4, 4)]
    with pytest.raises(RuntimeError, match="lacks 2 of 10 shards"):
        trak.score(make_trainer(), TARGETS)


def test_overflow_of_the_stored_dtype_is_an_error(tmp_path):
    weights = make_model().state_dict()
    weights["head.weight"] = weights["head.weight"] * 1e6
    with pytest.raises(ValueError, match=r"feature of example 0 at checkpoint 0 .* does not fit into torch.float16"):
        attribute(tmp_path, [weights], dtype=torch.float16)


def test_scoring_an_unfinished_store_is_refused(tmp_path, checkpoints):
    trak = TRAK(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32))
    for call in (lambda: trak.score(make_trainer(), TARGETS), trak.scorer):
        with pytest.raises(FileNotFoundError, match="not a feature store yet; call featurize first"):
            call()
    trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=10), shard_size=10)
    next((tmp_path / "store").rglob("shard-00003.safetensors")).unlink()
    for call in (lambda: trak.score(make_trainer(), TARGETS), trak.scorer):
        with pytest.raises(RuntimeError, match="lacks 1 of 10 shards"):
            call()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "made with seed 0, this TRAK has seed 1"),
        ({"projection": SparseProjection(64)}, "made with another projection"),
        ({"projection": GaussianProjection(32)}, "made with another projection"),
        ({"dtype": torch.float16}, "made with dtype float32"),
        ({"dtype": "int4"}, "made with dtype float32"),
        ({"parameters": "head.*"}, "made with 6 parameters, this TRAK has 2 "),
        ({"output": NegativeLoss(lambda module, batch: module(batch[0]).sum(1))}, "made with another output"),
    ],
)
def test_a_store_made_otherwise_is_refused(tmp_path, checkpoints, options, match):
    trainer = make_trainer()
    base = {"projection": SparseProjection(32)}
    TRAK(make_model(), checkpoints, tmp_path, **base).featurize(trainer, TRAIN)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    other = TRAK(make_model(), checkpoints, tmp_path, **(base | options))
    with pytest.raises(ValueError, match=match):
        other.featurize(trainer, TRAIN)
    with pytest.raises(ValueError, match=match):
        other.score(trainer, TARGETS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_other_checkpoints_and_data_are_refused(tmp_path, checkpoints):
    trainer = make_trainer()
    options = {"projection": SparseProjection(32)}
    TRAK(make_model(), checkpoints, tmp_path, **options).featurize(trainer, TRAIN)
    with pytest.raises(
        RuntimeError, match="lacks 2 of 4 shards, all those at 1 checkpoint: 1, whose weights or buffers"
    ):
        TRAK(make_model(), [checkpoints[0], make_model(seed=9).state_dict()], tmp_path, **options).score(
            trainer, TARGETS
        )
    with pytest.raises(ValueError, match="made with 50 training examples, this TRAK has 49"):
        TRAK(make_model(), checkpoints, tmp_path, **options).featurize(trainer, Subset(TRAIN, range(49)))


def test_a_finished_store_is_not_computed_again(tmp_path, checkpoints, monkeypatch):
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(make_trainer(), TRAIN)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard*")}
    monkeypatch.setattr("lightning_trak.features.extractor.FeatureExtractor.__call__", None)
    trak.featurize(make_trainer(), TRAIN)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard*")} == stamps


@pytest.mark.parametrize("shard_size", [0, -1, 2.5, True])
def test_shards_hold_examples(tmp_path, checkpoints, shard_size):
    trak = TRAK(make_model(), checkpoints, tmp_path / "store")
    with pytest.raises(ValueError, match=f"Expected `shard_size` to be a positive integer but got {shard_size}"):
        trak.featurize(make_trainer(), TRAIN, shard_size)
    assert not trak.store.exists()


def test_fewer_examples_than_features_without_damping_is_an_error(tmp_path, checkpoints):
    sizes = {"checkpoints": checkpoints, "store": tmp_path / "store", "projection": GaussianProjection(60)}
    paper = TRAK.paper(make_model(), **sizes)
    match = "damping=0 needs at least as many training examples as features, and there are 50 and 60: use a projection"
    with pytest.raises(ValueError, match=match):
        paper.featurize(make_trainer(), TRAIN)
    assert not paper.store.exists()
    TRAK(make_model(), **sizes).featurize(make_trainer(), TRAIN)
    with pytest.raises(ValueError, match=r"Gram matrix of checkpoint 0 \(60 x 60\) is singular.*larger damping"):
        paper.score(make_trainer(), TARGETS)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"curvature": "fisher"}, ValueError, "curvature must be one of 'gauss_newton', 'identity', .*; got 'fisher'"),
        ({"loss_gradients": "none"}, ValueError, "loss_gradients must be one of"),
        ({"engine": "fast"}, ValueError, "engine must be one of"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"dtype": "int2"}, ValueError, "dtype must be one of .* 'int8', 'int4', .* got 'int2'"),
        ({"damping": -1.0}, ValueError, "damping must be at least 0"),
        ({"damping": "Auto"}, ValueError, "damping must be at least 0 and finite, or 'auto'; got 'Auto'"),
        ({"soft_threshold": -1.0}, ValueError, "soft_threshold must be at least 0"),
        (
            {"projection": 8192},
            TypeError,
            r"object such as SparseProjection\(8192\), got 8192",
        ),
        ({"projection": GaussianProjection}, TypeError, "expected projection as an object .*got <class"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"output": "margin"}, TypeError, "must be a ModelOutput, got str"),
        (
            {"output": ClassificationMargin},
            TypeError,
            r"got the class ClassificationMargin: make an object of it, Class",
        ),
    ],
)
def test_bad_options(tmp_path, checkpoints, options, error, match):
    with pytest.raises(error, match=match):
        TRAK(make_model(), checkpoints, tmp_path, **options)


def test_numbers_of_numpy_are_numbers(tmp_path, checkpoints):
    options = {"seed": np.int64(3), "audit": np.int64(1), "damping": np.float32(0.5)}
    found = attribute(tmp_path, checkpoints, **options)
    again = attribute(tmp_path, checkpoints, seed=3, audit=1, damping=0.5)  # the same store
    torch.testing.assert_close(found, again)


def test_a_model_without_an_output_is_refused(tmp_path, checkpoints):
    with pytest.raises(TypeError, match="Linear declares no model output: derive it from AttributionMixin"):
        TRAK(nn.Linear(2, 2), checkpoints, tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    other = nn.Linear(6, 3).state_dict()
    with pytest.raises(ValueError, match=r"does not fit LitNet: .*\n.*Missing key"):
        attribute(tmp_path, [other])


@pytest.mark.parametrize("option", [{"limit_predict_batches": 1}, {"fast_dev_run": True}])
def test_a_trainer_that_would_skip_examples_is_refused(tmp_path, checkpoints, option):
    with pytest.raises(ValueError, match=r"limit_predict_batches=1.*use a Trainer without this limit"):
        attribute(tmp_path, checkpoints, trainer=make_trainer(**option))


def test_top_k_must_be_positive(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        attribute(tmp_path, checkpoints, score={"top_k": 0})


def test_a_checkpoint_that_changes_is_noticed(tmp_path, checkpoints):
    path = tmp_path / "last.pt"
    torch.save(checkpoints[0], path)
    trak = TRAK(make_model(), [path], tmp_path / "store", projection=SparseProjection(32))
    trak.featurize(make_trainer(), TRAIN)
    torch.save(checkpoints[1], path)
    with pytest.raises(ValueError, match=r"last\.pt\) have changed since this TRAK was made"):
        trak.score(make_trainer(), TARGETS)


def test_another_precision_is_refused(tmp_path, checkpoints):
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(make_trainer(precision="bf16-true"), TRAIN)
    with pytest.raises(ValueError, match="made with precision bf16-true, this TRAK has precision 32-true"):
        trak.score(make_trainer(), TARGETS)


def test_derivatives_that_are_not_finite_are_refused(tmp_path, checkpoints):
    class Broken(ClassificationMargin):
        def derivatives(self, output):
            loss_gradients, curvatures = super().derivatives(output)
            return torch.where(torch.arange(len(output)) == 3, torch.nan, loss_gradients), curvatures

    message = r"features of 2 examples \(3, 35\) .* are not finite \(outputs .*, loss_gradients nan, curv"
    with pytest.raises(ValueError, match=message):
        attribute(tmp_path, checkpoints, output=Broken())


def test_features_that_are_all_zero_are_noticed(tmp_path, checkpoints):
    class TwoHeads(LitNet):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(2, 2)

    model = TwoHeads()
    trak = TRAK(model, [model.state_dict()], tmp_path, projection=SparseProjection(32), parameters="other.*")
    with pytest.warns(UserWarning, match="features of examples 0 to 31 .* are zero: check that the output"):
        trak.featurize(make_trainer(), TRAIN)
    with pytest.raises(ValueError, match="Gram matrix of checkpoint 0 is zero"):
        trak.score(make_trainer(), TARGETS)


def test_a_model_that_is_sure_of_everything_is_told_what_to_do(tmp_path):
    class Sure(AttributionMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 2, bias=False)
            self.layer.weight.data.copy_(torch.tensor([[-150.0], [150.0]]))

        def forward(self, inputs):
            return self.layer(inputs)

        def configure_model_output(self):
            return ClassificationMargin()

    labels = torch.tensor([0, 1, 1, 0])
    data = TensorDataset(2.0 * labels.unsqueeze(1) - 1, labels)  # margins of 300, where float32 knows no curvature
    trak = TRAK(Sure(), [Sure().state_dict()], tmp_path / "32", projection=IdentityProjection())
    trak.featurize(make_trainer(), data)
    with pytest.raises(
        ValueError, match=r"is zero: .* so sure of all training examples .* earlier .* dtype=torch.float64"
    ):
        trak.score(make_trainer(), data)
    influence = InfluenceFunction(Sure(), [Sure().state_dict()], solver=Explicit())
    with pytest.raises(ValueError, match=r"no curvature at .* so sure of all training examples .* earlier checkpoint"):
        influence.attribute(make_trainer(), data, data)
    # As the errors say:
    options = {"projection": IdentityProjection(), "dtype": torch.float64, "lag": 1}
    trak = TRAK(Sure(), [Sure().state_dict()], tmp_path / "64", **options)
    scores = trak.attribute(make_trainer(precision="64-true"), data, data)
    # All gradients are phi, |phi|^2 = 2, Q = R, and the automatic damping is 1.75 w = 3.5 R, since R says nothing about
    # the noise: phi (4 R phi phi^T + 3.5 R)^-1 phi Q = 2 / 11.5.
    expected = torch.full((4, 4), 2 / 11.5, dtype=torch.float64)
    torch.testing.assert_close(scores, expected, check_dtype=False)
    precise = influence.attribute(make_trainer(precision="64-true"), data, data)
    torch.testing.assert_close(precise, expected, check_dtype=False)


def test_a_store_that_cannot_be_written_can_be_scored(tmp_path, checkpoints, expected, monkeypatch):
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(make_trainer(), TRAIN)

    def refuse(*args):
        raise PermissionError("read only")

    monkeypatch.setattr("lightning_trak.features.store.feature_store.FeatureStore.write_extra", refuse)
    with pytest.warns(UserWarning, match="Gram matrix cannot be kept .*: read only"):
        assert torch.equal(trak.score(make_trainer(), TARGETS), expected)


def test_a_shard_that_cannot_be_written_stops_featurizing(tmp_path, checkpoints, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(FeatureStore, "save", full)
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    with pytest.raises(OSError, match="No space left"):
        trak.featurize(make_trainer(), DataLoader(make_data(40), batch_size=8))


class _Crossed(ClassificationMargin):
    def loss(self, output):
        return (output - output.mean()) ** 2


class _Complex(ClassificationMargin):
    def output(self, module, batch):
        return super().output(module, batch).to(torch.complex64)


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (_Crossed(), "_Crossed.loss gives it another loss beside the output of another example"),
        (_Complex(), "_Complex.output returned complex numbers; expected one real number per example"),
    ],
)
def test_outputs_that_are_not_one_real_number_with_a_loss_of_its_own(tmp_path, checkpoints, output, match):
    with pytest.raises(ValueError, match=match):
        attribute(tmp_path, checkpoints, output=output)
