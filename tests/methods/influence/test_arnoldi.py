"""Arnoldi iteration says where it is rough, and is exact where its space is closed."""

import re
import warnings

import pytest
import torch

from lightning_trak.methods import Arnoldi, Explicit, InfluenceFunction
from tests.lit import make_data, make_model, make_trainer

TRAIN, TARGETS = make_data(64), make_data(13, seed=1)


def saturated(steps=30, factor=5):
    """A model with large weights: most examples have no curvature in float32."""
    model = make_model(steps=steps)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def scores(model, solver, precision="32-true", **options):
    method = InfluenceFunction(model, [model.state_dict()], solver=solver, **options)
    return method.attribute(make_trainer(precision=precision), TRAIN, TARGETS).double()


@pytest.mark.parametrize("factor", [5, 20])
def test_a_closed_space_leaves_nothing_out(factor):
    model = saturated(factor=factor)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*are off by about")
        found = scores(model, Arnoldi())
    torch.testing.assert_close(
        found, scores(model, Explicit(), "64-true"), rtol=1e-3, atol=1e-5 * float(found.abs().max())
    )


def test_what_is_left_out_is_measured():
    model = saturated(factor=1)
    exact = scores(model, Explicit(), "64-true", damping=0.01)
    said = r"are off by about (\d+)% of their size.* use a larger num_iterations and a"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        found = scores(model, Arnoldi(100, 50), damping=0.01)
    (percent,) = (int(match[1]) for warning in caught if (match := re.search(said, str(warning.message))))
    error = float(((found - exact)[:4].norm(dim=1) / exact[:4].norm(dim=1)).max())
    assert error > 0.1  # how large it is depends on the rounding of the version of torch
    assert percent == pytest.approx(100 * error, abs=1)


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"a product with the Hessian at checkpoint 0 .* is not finite.*64-true"):
        scores(saturated(300, 20), Arnoldi())
