"""Convolutions compute with their channels last in memory, and models that depend on the other order still work."""

import pytest
import torch
from torch import nn

from lightning_trak.gradients import HookEngine, LoopEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.channels_last import channels_last, reordered
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a build of torch with oneDNN")


class ViewGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx, gradient):
        assert torch.is_tensor(gradient.view(len(gradient), -1))
        return gradient


class Middle(nn.Module):
    """What a model does with images between two convolutions."""

    def __init__(self, change, see):
        super().__init__()
        self.change, self.see = change, see

    def forward(self, images):
        self.see(images.is_contiguous())
        return self.change(images)


def make(change=torch.relu, width=96):
    """A model, the orders in which images pass its middle, and a batch."""
    orders = []
    middle = Middle(change, lambda order: orders.append(order))
    layers = nn.Conv2d(3, width, 3), middle, nn.Conv2d(width, width, 3, padding=1), nn.AdaptiveAvgPool2d(1)
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 4)).eval()
    return module, orders, ExampleBatch((torch.randn(5, 3, 7, 7), torch.randint(4, (5,))), 5)


def features(kind, module, batch):
    engine = kind(module, ClassificationMargin(), select_parameters(module))
    bound = SparseProjection(16384).bind(
        {name: parameter.shape for name, parameter in engine.parameters.items()}, 0, 0, torch.device("cpu")
    )
    found = torch.zeros(batch.size, bound.dim)
    engine.project(batch, bound, found)
    return found


def test_the_order_changes_and_the_features_do_not():
    module, orders, batch = make()
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    found = features(HookEngine, module, batch)
    assert orders[-1] is False
    torch.testing.assert_close(found, features(LoopEngine, module, batch), rtol=1e-4, atol=1e-5)
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == before


@pytest.mark.parametrize(
    "change",
    [lambda images: images.view(len(images), -1).view(images.shape).relu(), ViewGradient.apply],
    ids=["forward", "backward"],
)
def test_a_model_that_needs_the_other_order_gets_it(change):
    module, orders, batch = make(change)
    found = features(HookEngine, module, batch)
    assert orders[-1] is True
    assert False in orders
    torch.testing.assert_close(found, features(LoopEngine, module, batch), rtol=1e-4, atol=1e-5)
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    assert engine.check(batch) == {}


class ByStrides(nn.Module):
    """Computes something else in another order, without an error."""

    def forward(self, images):
        return images * images.detach().as_strided((96, 1, 1), (25, 1, 1)).abs()


def test_a_model_that_computes_something_else_in_the_other_order_does_not_get_it():
    module, orders, batch = make(ByStrides())
    found = features(HookEngine, module, batch)
    assert orders[-1] is True
    module.double()
    in_double = ExampleBatch((batch.content[0].double(), batch.content[1]), 5)
    torch.testing.assert_close(found.double(), features(HookEngine, module, in_double).double(), rtol=1e-3, atol=1e-4)


def test_the_models_own_errors_come_through():
    def fail(images):
        raise RuntimeError("no images today")

    module, _, batch = make(fail)
    with pytest.raises(RuntimeError, match="no images today"):
        features(HookEngine, module, batch)
    assert all(parameter.is_contiguous() for parameter in module.parameters())


def test_which_weights_are_reordered():
    module, _, _ = make()
    assert [weight.shape for weight in reordered(module)] == [(96, 3, 3, 3), (96, 96, 3, 3)]
    assert reordered(make(width=16)[0]) == []
    assert reordered(module.double()) == []
    assert reordered(nn.Sequential(module.float(), nn.Conv2d(4, 4, 3, groups=2))) == []
    renamed = nn.Conv2d(96, 96, 3)
    renamed.kernels = renamed.weight
    del renamed.weight
    assert len(reordered(nn.Sequential(make()[0], renamed))) == 2
    tied = nn.Sequential(nn.Conv2d(96, 96, 3), nn.Conv2d(96, 96, 3))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.data_ptr()
    with channels_last(reordered(tied)):
        assert not tied[0].weight.is_contiguous()
    assert tied[0].weight.data_ptr() == before
