"""The gradient of a batch normalization's input, which hooks compute in the place of autograd."""

import pytest
import torch
from torch import nn

from lightning_trak.gradients import HookEngine, LoopEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.layers.normalization import BatchNormLayer
from lightning_trak.outputs import ClassificationMargin


def as_trained(module):
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return module.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, ()),
        (nn.BatchNorm1d, (4,)),
        (nn.BatchNorm2d, (4, 3)),
        (nn.BatchNorm3d, (2, 4, 3)),
    ],
)
def test_the_gradient_of_the_input_is_that_of_autograd(kind, shape, dtype):
    module = as_trained(kind(3)).to(dtype)
    inputs = torch.randn(5, 3, *shape).to(dtype).requires_grad_()
    output = module(inputs)
    gradient = torch.randn_like(output)

    found = BatchNormLayer(module).input_gradient()(gradient)

    (expected,) = torch.autograd.grad(output, inputs, gradient)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_of_layers_before_it_are_those_of_autograd(inplace):
    module = as_trained(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(64, 4),
            nn.BatchNorm1d(4),
        )
    ).double()
    batch = ExampleBatch((torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.arange(5) % 4), 5)
    names = select_parameters(module)

    values, found = HookEngine(module, ClassificationMargin(), names)(batch)

    expected_values, expected = LoopEngine(module, ClassificationMargin(), names)(batch)
    torch.testing.assert_close(values, expected_values)
    torch.testing.assert_close(found, expected)
