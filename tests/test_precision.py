"""Gradients in half precision: features are summed in float32, and scores stay what they were but for rounding."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.gradients import HookEngine, LoopEngine, MixedEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.outputs import ClassificationMargin, ContrastiveMargin
from lightning_trak.projections import KroneckerProjection, SparseProjection
from lightning_trak.store import FeatureStore
from lightning_trak.trainers import precision_of
from tests.lit import make_checkpoints, make_data, make_model, make_trainer
from tests.zoo import ZOO, specimen


def scores(directory, precision, projection, engine):
    trainer = make_trainer(precision=precision)
    trak = TRAK(make_model(), make_checkpoints(2), directory, projection=projection, engine=engine, damping=1.0)
    trak.featurize(trainer, DataLoader(make_data(60), batch_size=16))
    return trak.score(trainer, DataLoader(make_data(20, seed=1), batch_size=16))


@pytest.mark.parametrize(("precision", "engine"), [("true", "hooks"), ("true", "functional"), ("mixed", "hooks")])
@pytest.mark.parametrize("projection", [SparseProjection(64), KroneckerProjection(4, 4)], ids=["sparse", "kronecker"])
def test_scores_in_bfloat16(tmp_path, precision, engine, projection):
    exact = scores(tmp_path / "32", "32-true", projection, engine)
    rough = scores(tmp_path / "16", f"bf16-{precision}", projection, engine)
    assert rough.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([exact.flatten(), rough.flatten()]))[0, 1]) > 0.995
    manifest = FeatureStore.read_manifest(tmp_path / "16")
    store = FeatureStore(tmp_path / "16", manifest["identity"], manifest["num_examples"], read_only=True)
    features = store.read(0, 0).features
    assert features.dtype == torch.float32
    assert (features != features.bfloat16()).any(), "sums must not be rounded to bfloat16"


def test_a_store_in_another_precision_is_refused(tmp_path):
    scores(tmp_path, "32-true", SparseProjection(64), "auto")
    with pytest.raises(ValueError, match="was made with precision 32-true, this TRAK has precision bf16-true"):
        scores(tmp_path, "bf16-true", SparseProjection(64), "auto")


@pytest.mark.parametrize("name", ZOO)
def test_hooks_under_autocast(name):
    """Every layer's gradient, in whatever precision autocast runs the layer, is float32's up to bfloat16's rounding."""
    module, output, batch, size = specimen(name)
    names = select_parameters(module)
    left_out = HookEngine.uncovered(module, names)
    exact = LoopEngine(module, output, names)(ExampleBatch(batch, size))[1]
    if left_out:
        engine = MixedEngine(module, output, names, left_out, torch.bfloat16)
    else:
        engine = HookEngine(module, output, names, torch.bfloat16)
    rough = engine(ExampleBatch(batch, size))[1]
    assert engine.check(ExampleBatch(batch, size)) == {}
    for key, gradient in exact.items():
        assert (rough[key] - gradient).norm() <= 0.05 * gradient.norm() + 1e-6, key
    assert any(not torch.equal(rough[key], gradient) for key, gradient in exact.items())


@pytest.mark.parametrize(
    ("precision", "features"),
    [("32-true", "32-true"), ("bf16-mixed", "bf16-mixed"), ("16-mixed", "32-true"), ("bf16-true", "bf16-true")],
)
def test_float16_needs_a_loss_to_scale(precision, features):
    assert precision_of(SimpleNamespace(precision=precision), ClassificationMargin()) == features


@pytest.mark.parametrize(("name", "said"), [("mlp", "in bfloat16 mixed precision"), ("lstm", "of the weights")])
def test_the_log_says_where_mixed_precision_is_used(tmp_path, caplog, name, said):
    module, output, batch, size = specimen(name)
    trak = TRAK(module, [module.state_dict()], tmp_path, output=output, projection=SparseProjection(8))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trak.featurize(make_trainer(precision="bf16-mixed"), DataLoader(TensorDataset(*batch), batch_size=size))
    assert said in next(line for line in caplog.messages if "chosen by engine='auto'" in line)


def test_an_output_with_a_context_is_not_rounded(tmp_path):
    """A pair must find itself in the bank."""

    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(5, 4)

        def forward(self, first, second):
            return self.first(first), self.second(second)

    torch.manual_seed(0)
    model, pairs = Towers(), TensorDataset(torch.randn(20, 6), torch.randn(20, 5))
    scores = []
    for precision in ("32-true", "bf16-mixed"):
        trak = TRAK(model, [model.state_dict()], tmp_path / precision, output=ContrastiveMargin(context_size=8))
        scores.append(trak.attribute(make_trainer(precision=precision), DataLoader(pairs, batch_size=5), pairs))
        assert FeatureStore.read_manifest(tmp_path / precision)["identity"]["precision"] == "32-true"
    assert torch.equal(*scores)
