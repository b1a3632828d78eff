"""Logistic regression, where the truth is known: closed form in NumPy, and leave-one-out retraining by scikit-learn."""

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_trak import TRAK, AttributionMixin
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection
from tests.lit import make_trainer

RIDGE = 2.0


class LitLogistic(AttributionMixin, L.LightningModule):
    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.linear = nn.Linear(len(weight), 1, bias=False, dtype=torch.float64)
        self.linear.weight.data = torch.tensor(weight).unsqueeze(0)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)

    def configure_model_output(self) -> ClassificationMargin:
        return ClassificationMargin()


def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    model = LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    return model.fit(x, y).coef_[0]


@pytest.fixture(scope="module")
def problem():
    x, y = load_breast_cancer(return_X_y=True)
    # Ten features for 400 examples: one Newton step leaves out the factor 1 / (1 - leverage), so that must be small.
    x = StandardScaler().fit_transform(x[:, :10])
    order = np.random.default_rng(0).permutation(len(x))
    train, targets = order[:400], order[400:440]
    return x[train], y[train], x[targets], y[targets]


def closed_form(problem) -> tuple[np.ndarray, np.ndarray]:
    """Scores by Pregibon's formula, and the relative damping that stands for the ridge term."""
    x, y, target_x, target_y = problem
    w = fit(x, y)
    sign, target_sign = 2 * y - 1, 2 * target_y - 1
    p = 1 / (1 + np.exp(-sign * (x @ w)))
    gram = (x * (p * (1 - p))[:, None]).T @ x
    newton = np.linalg.solve(gram + RIDGE * np.eye(len(w)), (x * (sign * (1 - p))[:, None]).T)
    return target_sign[:, None] * (target_x @ newton), RIDGE / np.diag(gram).mean()


@pytest.fixture(scope="module")
def scores(problem, tmp_path_factory):
    x, y, target_x, target_y = problem
    model = LitLogistic(fit(x, y))
    trak = TRAK(
        model,
        [model.state_dict()],
        tmp_path_factory.mktemp("store"),
        projection=IdentityProjection(),
        curvature="gauss_newton",
        damping=closed_form(problem)[1],
        dtype=torch.float64,
    )
    trainer = make_trainer()
    trak.featurize(trainer, TensorDataset(torch.tensor(x), torch.tensor(y)))
    return trak.score(trainer, TensorDataset(torch.tensor(target_x), torch.tensor(target_y)))


def test_scores_are_the_closed_form_in_float64(problem, scores):
    assert scores.dtype == torch.float64
    expected = closed_form(problem)[0]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_scores_predict_leave_one_out_retraining(problem, scores):
    x, y, target_x, target_y = problem
    sign = 2 * target_y - 1
    full = sign * (target_x @ fit(x, y))
    effects = np.stack(
        [full - sign * (target_x @ fit(np.delete(x, i, 0), np.delete(y, i))) for i in range(len(x))], axis=1
    )
    assert np.corrcoef(scores.numpy().ravel(), effects.ravel())[0, 1] > 0.99
    # Not only the order: a positive score says that training on the example raises the output, by about that much.
    slope = (scores.numpy() * effects).sum() / (effects**2).sum()
    assert 0.8 < slope < 1.05
