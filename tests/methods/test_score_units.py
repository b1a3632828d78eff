"""What a score says: a model is fitted exactly, an example is trained on once more, and the outputs are compared."""

import inspect
import re

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_trak import TRAK, AttributionMixin, methods
from lightning_trak.methods import (
    Datamodels,
    DataShapley,
    EKFACInfluence,
    EmpiricalInfluence,
    Explicit,
    GradientCosine,
    GradientDot,
    InfluenceFunction,
    Method,
    TracIn,
)
from lightning_trak.outputs import RegressionOutput
from lightning_trak.projections import IdentityProjection
from lightning_trak.retraining import random_subsets
from tests.lit import make_trainer

RIDGE, WIDTH, NUM_TRAIN = 2.0, 3, 30
EXACT = {"projection": IdentityProjection(), "dtype": torch.float64}


def make_data(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1) + noise)


TRAIN, TARGETS = make_data(NUM_TRAIN, 0), make_data(6, 1)


def fit(inputs: Tensor, labels: Tensor) -> Tensor:
    """Ridge regression in closed form."""
    return torch.linalg.solve(inputs.T @ inputs + RIDGE * torch.eye(WIDTH, dtype=torch.float64), inputs.T @ labels)


class Ridge(AttributionMixin, L.LightningModule):
    """Fitted by its one training step. The output is prediction minus label."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64)
        self.linear.weight.data.zero_()
        self.automatic_optimization = False

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.linear.weight.data = fit(*batch).unsqueeze(0)

    def configure_optimizers(self) -> None:
        return None

    def configure_model_output(self) -> RegressionOutput:
        return RegressionOutput()


def outputs(weights: Tensor) -> Tensor:
    inputs, labels = TARGETS.tensors
    return inputs @ weights - labels


def fitted() -> Ridge:
    model = Ridge()
    model.training_step(TRAIN.tensors)
    return model


def once_more() -> Tensor:
    """By how much each target's output rises if an example is there twice, ``(num_targets, num_train)``."""
    before = outputs(fit(*TRAIN.tensors))
    twice = [torch.cat([torch.arange(NUM_TRAIN), torch.tensor([i])]) for i in range(NUM_TRAIN)]
    return torch.stack([outputs(fit(*(part[rows] for part in TRAIN.tensors))) - before for rows in twice], dim=1)


def damping() -> float:
    return RIDGE / float(TRAIN.tensors[0].square().sum() / WIDTH)  # relative to the mean eigenvalue


def subset_method(kind, **options):
    masks = random_subsets(NUM_TRAIN, 400)
    trained = [outputs(fit(*(part[mask] for part in TRAIN.tensors))) for mask in masks]
    return kind(masks, torch.stack(trained, dim=1), **options)


NEWTON = {
    "TRAK": lambda model, store: TRAK(model, [model.state_dict()], store, damping=damping(), **EXACT),
    "TRAK.paper": lambda model, store: TRAK.paper(model, [model.state_dict()], store, damping=damping(), **EXACT),
    "influence": lambda model, _: InfluenceFunction(
        model, [model.state_dict()], solver=Explicit(), curvature="exact", damping=damping()
    ),
    "EK-FAC": lambda model, _: EKFACInfluence(model, [model.state_dict()], damping=damping()),
}
RETRAINED = {
    "datamodels": lambda *_: subset_method(Datamodels),
    "empirical influence": lambda *_: subset_method(EmpiricalInfluence),
    "data Shapley": lambda *_: DataShapley(Ridge, lambda: make_trainer(max_epochs=1), permutations=20, step=3),
}


@pytest.mark.parametrize("name", NEWTON)
def test_scores_are_changes_of_the_output_when_an_example_counts_once_more(name, tmp_path):
    scores = NEWTON[name](fitted(), tmp_path).attribute(make_trainer(), TRAIN, TARGETS)
    inputs = TRAIN.tensors[0]
    matrix = inputs.T @ inputs + RIDGE * torch.eye(WIDTH, dtype=torch.float64)
    leverage = (torch.linalg.solve(matrix, inputs.T).T * inputs).sum(1)
    # A Newton step ignores the leverage of the example; for a quadratic loss this factor is exact.
    torch.testing.assert_close(scores / (1 + leverage), once_more(), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", RETRAINED)
def test_a_positive_score_of_a_retraining_method_says_that_the_example_raises_the_output(name, tmp_path):
    train = torch.utils.data.DataLoader(TRAIN, batch_size=NUM_TRAIN)
    scores = RETRAINED[name](fitted(), tmp_path).attribute(make_trainer(), train, TARGETS)
    rises = once_more()
    for row, rise in zip(scores, rises, strict=True):
        strongest = row.abs().topk(3).indices  # the others are estimated with noise
        assert torch.equal(row[strongest].sign().double(), rise[strongest].sign())


@pytest.mark.parametrize("effect_on", ["loss", "output"])
@pytest.mark.parametrize("kind", [GradientDot, GradientCosine, TracIn])
def test_the_default_of_gradient_methods_is_the_loss_and_the_other_is_the_output(kind, effect_on, tmp_path):
    """One step of gradient descent on each example, from weights that are no minimum."""
    model = Ridge()
    options = {"learning_rates": 1e-6} if kind is TracIn else {}
    options |= {"effect_on": "output"} if effect_on == "output" else {}
    scores = kind(model, [model.state_dict()], tmp_path, **options, **EXACT).attribute(make_trainer(), TRAIN, TARGETS)
    start = model.linear.weight[0].detach()
    inputs, labels = TRAIN.tensors
    stepped = start - 1e-6 * (inputs @ start - labels).unsqueeze(1) * inputs
    before, after = outputs(start), torch.stack([outputs(weights) for weights in stepped], dim=1)
    seen = after - before[:, None] if effect_on == "output" else (before[:, None].square() - after.square()) / 2
    assert torch.equal(scores.sign(), seen.sign())
    if kind is not GradientCosine:
        unit = 1.0 if kind is TracIn else 1e-6
        torch.testing.assert_close(scores * unit, seen, rtol=1e-3, atol=1e-9)


ALL = [getattr(methods, name) for name in methods.__all__]
ALL = [method for method in ALL if issubclass(method, Method) and not inspect.isabstract(method)]


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.__name__)
def test_the_first_lines_of_a_method_say_what_a_score_is(method):
    summary, meaning, *_ = inspect.getdoc(method).split("\n\n")
    assert summary.endswith("?") or "no question" in summary
    assert "A positive score" in meaning
    assert re.search(r"\bunit\b", meaning)
