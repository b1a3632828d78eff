"""Gradients of convolutions: by products with patches, by one convolution of all examples, and some rows alone."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_trak.gradients import LayerCall
from lightning_trak.gradients.hooks.layers import convolution
from lightning_trak.gradients.hooks.layers.convolution import ConvolutionLayer

SIZE = 3


@pytest.fixture(params=["patches, an example at a time", "patches, all examples at once", "a convolution"])
def _way(request, monkeypatch):
    if request.param == "a convolution":
        monkeypatch.setattr(convolution, "_FEW_CHANNELS", 0)  # unless an output has few positions
    elif request.param == "patches, an example at a time":
        monkeypatch.setattr(convolution, "_CPU_BYTES", 1)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("channels", [3, convolution._FEW_CHANNELS])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 4, "stride": 4},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_kernels_have_the_gradients_of_autograd(options, channels_last, channels, images):
    module = nn.Conv2d(channels, 5, **options).double()
    inputs = torch.randn(SIZE * images, channels, 9, 8, dtype=torch.float64)
    if channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    output_gradient = torch.randn_like(module(inputs))
    call, layer = LayerCall(inputs, output_gradient, SIZE), ConvolutionLayer(module)

    found = layer.gradient("weight", call)

    for example in range(SIZE):
        some = call.take(example, example + 1)
        weight = module.weight.detach().clone().requires_grad_()
        output = functional_call(module, {"weight": weight}, some.inputs)
        (expected,) = torch.autograd.grad(output, weight, some.output_gradient)
        torch.testing.assert_close(found[example], expected)
    torch.testing.assert_close(layer.gradient_rows("weight", call, range(1, 3)), found[:, 1:3])
    output_gradients, patches = layer.factors(call)
    torch.testing.assert_close(output_gradients.mT @ patches, found.flatten(2))
    output_gradients, patches = layer.ordered_factors(call)
    torch.testing.assert_close(output_gradients.mT @ patches, found.movedim(2, -1).flatten(2))


@pytest.mark.parametrize("channels", [2, convolution._FEW_CHANNELS])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_convolutions_of_other_dimensions_have_patches(kind, channels):
    dims = {nn.Conv1d: 1, nn.Conv3d: 3}[kind]
    module = kind(channels, 30, 3, stride=2, padding=1).double()
    inputs = torch.randn(SIZE, channels, *[6] * dims, dtype=torch.float64)
    call = LayerCall(inputs, torch.randn_like(module(inputs)), SIZE)
    found = ConvolutionLayer(module).gradient("weight", call)
    (expected,) = torch.autograd.grad(module(inputs), module.weight, call.output_gradient)
    torch.testing.assert_close(found.sum(0), expected)
