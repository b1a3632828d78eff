"""Solvers say that scores are wrong where the residual does not: the curvature is nearly zero in some directions."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_trak.methods import ConjugateGradient, InfluenceFunction, LiSSA
from lightning_trak.outputs import RegressionOutput
from tests.lit import make_trainer


def attribute(solver, scale, **options):
    """Scores of a line, whose inputs have this size. The exact ones do not depend on it: the damping is 0."""
    generator = torch.Generator().manual_seed(0)
    inputs, truths = torch.randn(12, 2, generator=generator).double(), torch.randn(12, generator=generator).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.zero_()  # so that the residuals do not depend on the size of the inputs, either
    data = TensorDataset(inputs * scale, truths)
    method = InfluenceFunction(model, output=RegressionOutput(), solver=solver, damping=0.0, **options)
    return method.attribute(make_trainer(precision="64-true"), data, TensorDataset(inputs[:5] * scale, truths[:5]))


SOLVERS = [
    (ConjugateGradient(), r"are off by about \d+% .* the damped Hessian is ill-conditioned: use a larger damping"),
    (LiSSA(50), r"are off by about \d+% .*, by LiSSA after 50 steps: use more depth"),
]


@pytest.mark.parametrize(("solver", "message"), SOLVERS)
def test_a_small_residual_is_not_enough(solver, message):
    exact = attribute(ConjugateGradient(), 1.0)
    with pytest.warns(RuntimeWarning, match=message):
        found = attribute(solver, 1e-6)
    assert float((found - exact).norm()) > 0.1 * float(exact.norm())


def test_a_smaller_tolerance_is_enough():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*are off by about")
        found = attribute(ConjugateGradient(tolerance=1e-10), 1e-6)
    torch.testing.assert_close(found, attribute(ConjugateGradient(), 1.0), rtol=1e-3, atol=1e-3)


def test_a_strict_solver_refuses_such_scores():
    with pytest.raises(ValueError, match="are off by about"):
        attribute(ConjugateGradient(strict=True), 1e-6)
