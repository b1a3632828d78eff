"""Models whose layers are not all in float32."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_trak import TRAK
from lightning_trak.gradients import FunctionalEngine, HookEngine, LoopEngine
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection
from tests.lit import TARGETS, TRAIN, make_trainer


class Casts(nn.Module):
    """A body and a head in dtypes of their own."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5, dtype=body), nn.Linear(5, 3, dtype=head)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs.to(self.body.weight.dtype))).to(self.head.weight.dtype)).float()


@pytest.mark.parametrize("engine", [FunctionalEngine, HookEngine, LoopEngine])
@pytest.mark.parametrize("selected", ["body", "head", ""])
def test_rounding_is_that_of_the_coarsest_layer(engine, selected):
    """Also of one that is not differentiated, as under adapters in float32: all outputs pass through it."""
    module = Casts(torch.float64, torch.float32)
    names = {name: name for name, _ in module.named_parameters() if name.startswith(selected)}
    assert engine(module, ClassificationMargin(), names).rounding == 1e-3
    names = {"head.weight": "head.weight"}
    assert engine(Casts(torch.bfloat16, torch.float32), ClassificationMargin(), names).rounding == 0.05


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16-true"), (torch.float64, "64-true")])
@pytest.mark.parametrize("engine", ["auto", "functional", "hooks", "loop"])
def test_weights_that_the_data_do_not_fit_are_explained(tmp_path, dtype, precision, engine):
    model = nn.Linear(6, 3, dtype=dtype)
    options = {"output": ClassificationMargin(), "projection": IdentityProjection(), "engine": engine}
    trak = TRAK(model, store=tmp_path, **options)
    said = f"Linear has weights in {str(dtype).removeprefix('torch.')}, and they met numbers of another dtype"
    with pytest.raises(ValueError, match=said + f".*use Trainer.precision='{precision}'"):
        trak.featurize(make_trainer(), TRAIN)
    trainer = make_trainer(precision=precision)
    trak.featurize(trainer, TRAIN)
    assert trak.score(trainer, TARGETS).isfinite().all()


def test_data_in_float64_are_explained(tmp_path):
    """As NumPy makes them."""
    trak = TRAK(nn.Linear(6, 3), store=tmp_path, output=ClassificationMargin(), projection=IdentityProjection())
    data = TensorDataset(TRAIN.tensors[0].double(), TRAIN.tensors[1])
    with pytest.raises(ValueError, match=r"Linear has weights in float32, .* convert the data to float32"):
        trak.featurize(make_trainer(), data)


def test_integers_that_are_missing_are_no_matter_of_precision(tmp_path):
    model = nn.Embedding(5, 3)
    trak = TRAK(model, store=tmp_path, output=ClassificationMargin(), projection=IdentityProjection())
    with pytest.raises(RuntimeError, match="Long"):
        trak.featurize(make_trainer(), TRAIN)
