"""Influence functions in every precision, and for models of other dtypes."""

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.methods.influence.reference import (
    METHODS,
    TARGETS,
    TRAIN,
    Net,
    Once,
    ekfac,
    reference,
    relative_error,
    seeded,
)

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", METHODS)
def test_every_precision_gives_the_scores_of_float32_or_float64(name, precision):
    model = seeded(Net)
    scores = METHODS[name](model, precision=precision)
    assert scores.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    rough = 1e-3 if name == "lissa" else 1e-5
    expected = reference(model, TRAIN, TARGETS)
    assert relative_error(scores, expected) < (1e-3 if precision == "64-true" and name == "lissa" else rough)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ekfac_is_as_exact_in_every_precision(precision):
    model = seeded(Once)
    scores = ekfac(model, precision=precision)
    assert scores.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert relative_error(scores, ekfac(copy.deepcopy(model).double(), *map(double, (TRAIN, TARGETS)))) < 1e-5


def double(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0].double(), data.tensors[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_dtype_is_computed_with_in_float32_at_least(dtype):
    """Its weights stay what they were rounded to."""
    model = seeded(Net).to(dtype)
    train, targets = (TensorDataset(part.tensors[0].to(dtype), part.tensors[1]) for part in (TRAIN, TARGETS))
    scores = METHODS["conjugate_gradient"](model, train, targets)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(scores, reference(model, train, targets)) < 1e-4
    assert model.first.weight.dtype == dtype


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_inputs_of_another_dtype_follow_the_weights(precision):
    model = seeded(Net)
    scores = METHODS["explicit"](model, *map(double, (TRAIN, TARGETS)), precision=precision)
    assert relative_error(scores, reference(model, TRAIN, TARGETS)) < 1e-4
