"""The proof of the hook engine that rows belong to the examples that it assumes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trak.gradients import HookEngine, LoopEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.ownership import example_weights
from lightning_trak.outputs import ClassificationMargin, NegativeLoss


class _Sorted(nn.Module):
    """Puts the examples in order of their first number while it computes, as packed sequences are."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.inner(x[order]))[order.argsort()])


@pytest.mark.parametrize("number", [3.0, math.nan])
def test_rows_that_change_places_are_found(number):
    """Also if another example has no finite gradient."""
    module = _Sorted()
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    ordered = torch.tensor([1.0, 2.0, 3.0])[:, None] * torch.ones(3, 4)
    engine(ExampleBatch((ordered, torch.tensor([0, 1, 2])), 3))
    inputs = torch.tensor([3.0, 1.0, 2.0])[:, None] * torch.ones(3, 4)  # the same shapes
    inputs[0, 3] = number
    with pytest.raises(
        ValueError, match=r"rows of the output of inner, of shape \(3, 4\), do not belong to the 3 exam"
    ):
        engine(ExampleBatch((inputs, torch.tensor([0, 1, 2])), 3))


class _Cancelling(nn.Module):
    """What reaches the first layer is the difference of two gradients that are ten thousand times larger."""

    def __init__(self):
        super().__init__()
        self.inner, self.wide, self.head = nn.Linear(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)
            self.wide.weight[1] = -self.wide.weight[0]
            self.head.weight[:, 1] = (1 + 1e-4) * self.head.weight[:, 0]

    def forward(self, x):
        return self.head(self.wide(torch.tanh(self.inner(x))))


@pytest.mark.parametrize("size", [2, 40])
def test_rows_whose_gradients_cancel_are_those_of_their_examples(size):
    module, generator = _Cancelling(), torch.Generator().manual_seed(1)
    batch = torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)
    names = select_parameters(module, "inner.*")
    _, found = HookEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, size))
    _, expected = LoopEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, size))
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=0.01, atol=0.01 * float(rows.abs().max()))


class _Averaging(nn.Module):
    """Has several rows for an example."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x).mean(1)


@pytest.mark.parametrize("scale", [1, 3e4])
def test_rows_in_float16_are_those_of_their_examples(scale):
    """Large weights of examples would be out of range, and large gradients are with any weight."""
    generator = torch.Generator().manual_seed(0)
    module = _Averaging().half()
    batch = torch.randn(40, 5, 4, generator=generator).half(), torch.randint(0, 3, (40,), generator=generator)

    def loss(net, batch):
        return scale * F.cross_entropy(net(batch[0]).float(), batch[1], reduction="none")

    output = NegativeLoss(loss)
    names = select_parameters(module)
    _, found = HookEngine(module, output, names)(ExampleBatch(batch, 40))
    _, expected = LoopEngine(module, output, names)(ExampleBatch(batch, 40))
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=0.01, atol=0.01 * scale)


@pytest.mark.parametrize("scale", [1e-21, 1e-22, 1e12, 1e18])
def test_rows_whose_gradients_have_no_squares_are_those_of_their_examples(scale):
    """Such squares are out of the range of float32."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    output = NegativeLoss(lambda net, batch: scale * F.cross_entropy(net(batch[0]), batch[1], reduction="none"))
    batch = torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    names = select_parameters(module)
    _, found = HookEngine(module, output, names)(ExampleBatch(batch, 40))
    _, expected = LoopEngine(module, output, names)(ExampleBatch(batch, 40))
    for name, rows in expected.items():
        torch.testing.assert_close(found[name] / scale, rows / scale, rtol=1e-4, atol=1e-4)


def test_examples_of_one_weight_have_different_ones_in_the_next_check():
    like = torch.zeros(100, dtype=torch.float64)
    first, second = (example_weights(100, like, torch.float32, number) for number in (0, 1))
    assert len(example_weights(32, like, torch.float32, 0).unique()) == 32
    together = [(weights[:, None] == weights).fill_diagonal_(False) for weights in (first, second)]
    assert together[0].any()
    assert (together[0] & together[1]).sum() < together[0].sum() / 4


class _Unpadded(nn.Module):
    """Drops padding before a layer, so that an example has as many rows as it has tokens."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, keep):
        full = torch.zeros_like(x)
        full[keep] = torch.tanh(self.inner(x[keep]))
        return self.head(full.sum(1))


def test_rows_are_not_dealt_out_by_number_alone():
    module = _Unpadded()
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    inputs, labels = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    for lengths in ([4, 4, 4, 4], [4, 4, 3, 5]):  # as many tokens in all, and the first two alike
        keep = torch.arange(6) < torch.tensor(lengths)[:, None]
        batch = ExampleBatch((inputs, keep, labels), 4)
        if lengths[2] == 4:
            engine(batch)
            continue
        with pytest.raises(ValueError, match="rows of the output of inner"):
            engine(batch)
