"""Steps of optimizers as functions."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_trak.replay.optimizers.sgd import SGDStep


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"nesterov": True, "momentum": 0.9}, {"dampening": 0.3, "momentum": 0.9}]
)
@pytest.mark.parametrize("started", [False, True])
def test_the_factors_of_sgd_are_its_derivatives(options: dict[str, Any], started: bool) -> None:
    group = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, **options).param_groups[0]
    names = ["parameter", "gradient"] + ["momentum_buffer"] * started
    leaves = [torch.randn(1, dtype=torch.float64, requires_grad=True) for _ in names]
    kept = dict(zip(names[2:], leaves[2:], strict=True))
    new, changed = SGDStep().update(leaves[0], leaves[1], kept, group)
    results = {"parameter": new, **kept, **changed}
    factors = SGDStep().factors(kept, group)
    assert factors.keys() == results.keys()
    for result, value in results.items():
        slopes = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        for name, slope in zip(names, slopes, strict=True):
            assert factors[result].get(name, 0.0) == pytest.approx(0.0 if slope is None else float(slope))
