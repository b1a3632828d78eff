"""Derivatives of gradients by autograd, compared with differences of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations

from lightning_trak.gradients.second_derivatives import _moved, has_derivative


class Tanh(torch.autograd.Function):
    """Its backward reads its result outside of the graph."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.result = inputs.tanh()
        return ctx.result.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.result**2)


class OnceTanh(Tanh):
    """It refuses second derivatives, but nobody hears it if only leaves behind it are asked for."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.result**2)


class Net(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.middle = middle

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.middle(self.first(inputs)))


def loss(module: nn.Module, weights: Tensor) -> Tensor:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(weights)
    return (weights * F.cross_entropy(module(inputs), torch.arange(5) % 3, reduction="none")).sum()


def holds(module: nn.Module, **options: Any) -> bool:
    return has_derivative(module, list(module.parameters()), loss, torch.ones(5), **options)


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "batch norm": lambda z: F.batch_norm(z, None, None, training=True),
    "dropout": lambda z: F.dropout(z.tanh(), 0.5),
    "a detached shift that cancels": lambda z: (z - z.detach().amax(1, keepdim=True)).log_softmax(1),
    "rounding to float32": lambda z: z.float().tanh().to(z),
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda z: z / z.detach().norm(dim=1, keepdim=True),
    "straight through": lambda z: z.tanh() + (z.round() - z.tanh()).detach(),
    "a custom function": Tanh.apply,
    "once differentiable": OnceTanh.apply,
}


@pytest.mark.parametrize("name", SMOOTH)
def test_autograd_has_the_derivative(name):
    assert holds(Net(SMOOTH[name]))


@pytest.mark.parametrize("name", WRONG)
def test_autograd_lacks_a_part_of_the_derivative(name):
    assert not holds(Net(WRONG[name]))


def test_a_derivative_by_the_variable_alone():
    assert holds(Net(Tanh.apply), by_parameters=False)
    assert not holds(Net(OnceTanh.apply), by_parameters=False)


def test_an_operation_of_torch_with_a_wrong_second_derivative():
    module = Net(torch.tanh).double()
    parametrizations.weight_norm(module.first)
    right = torch.autograd.gradgradcheck(torch._weight_norm, _norm_and_direction(), raise_exception=False)
    assert holds(module) == right


def _norm_and_direction() -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in (3, 1))


def test_what_cannot_be_computed_in_float64_passes():
    single = torch.ones(6)
    assert holds(Net(lambda z: torch.relu(z) @ torch.diag(single)))


def test_what_a_forward_pass_has_left_on_the_module_does_no_harm():
    module = Net(torch.relu)
    module.kept = module(torch.randn(2, 4))  # with its graph, as the state of a torchmetrics metric
    assert holds(module)


def test_the_module_and_the_random_state_stay():
    module = Net(SMOOTH["dropout"])
    before, state = {name: part.clone() for name, part in module.state_dict().items()}, torch.get_rng_state()
    holds(module)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_tensors_are_back_after_an_error():
    leaf, way = torch.randn(3), torch.randn(3)
    before = leaf.clone()
    with pytest.raises(KeyError), _moved([leaf], [way], 0.1):
        raise KeyError
    assert torch.equal(leaf, before)
