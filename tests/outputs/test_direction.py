"""DirectionOutput against activations that are taken by hand; pooling, layers, and what does not fit."""

import pytest
import torch
from torch import nn

from lightning_trak.outputs import DirectionOutput
from tests.outputs.tasks import Texts

SIZE, LENGTH, WIDTH = 3, 5, 4


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Texts().double()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    return {"input_ids": torch.randint(0, 9, (SIZE, LENGTH)), "attention_mask": mask}


@pytest.fixture
def direction():
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def activations(module, batch):
    hidden = module.embedding(batch["input_ids"]) * batch["attention_mask"].unsqueeze(-1)
    return module.block(hidden.cumsum(1))


def test_mean_and_last_position(module, batch, direction):
    hidden = activations(module, batch)
    mean = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2, 2:].mean(0)]) @ direction
    last = torch.stack([hidden[0, 4], hidden[1, 1], hidden[2, 4]]) @ direction
    parameters = [*module.embedding.parameters(), *module.block.parameters()]
    for pool, expected in (("mean", mean), ("last", last)):
        found = DirectionOutput("block", direction, pool).output(module, batch)
        torch.testing.assert_close(found, expected)
        for mine, plain in zip(
            torch.autograd.grad(found.sum(), parameters),
            torch.autograd.grad(expected.sum(), parameters, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, plain)


def test_without_a_mask_all_positions_count(module, batch, direction):
    ids = batch["input_ids"]
    hidden = module.block(module.embedding(ids).cumsum(1))
    for pool, expected in (("mean", hidden.mean(1)), ("last", hidden[:, -1])):
        torch.testing.assert_close(DirectionOutput("block", direction, pool).output(module, ids), expected @ direction)


def test_functions_and_whole_activations(module, batch, direction):
    hidden = activations(module, batch)
    largest = DirectionOutput("block", direction, pool=lambda hidden, batch: hidden.amax(1))
    torch.testing.assert_close(largest.output(module, batch), hidden.amax(1) @ direction)
    whole = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    found = DirectionOutput("block", whole).output(module, batch)
    torch.testing.assert_close(found, (hidden * whole).sum((1, 2)))


def test_maps_vectors_and_tuples():
    class Tuple(nn.Module):
        def forward(self, hidden):
            return hidden, None

    module = nn.Sequential(nn.Conv2d(2, 3, 3), Tuple())
    images, direction = torch.randn(4, 2, 5, 6), torch.randn(3)
    expected = module[0](images).mean((2, 3)) @ direction
    for layer in ("0", "1"):
        torch.testing.assert_close(DirectionOutput(layer, direction).output(module, images), expected)
    linear = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    inputs = torch.randn(5, 4)
    found = DirectionOutput("1", direction, forward=lambda module, batch: module(batch["x"]))
    torch.testing.assert_close(found.output(linear, {"x": inputs, "y": 3}), linear(inputs) @ direction)


def test_layers_that_are_changed_in_place_later():
    module, inputs, direction = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), torch.randn(5, 4), torch.randn(3)
    found = DirectionOutput("0", direction).output(module, inputs)
    torch.testing.assert_close(found, module[0](inputs) @ direction)
    assert not module[0]._forward_hooks


def test_half_precision_is_reduced_in_float32():
    module, inputs, direction = nn.Linear(4, 3).bfloat16(), torch.randn(5, 4).bfloat16(), torch.randn(3)
    found = DirectionOutput("", direction).output(module, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, module(inputs).float() @ direction)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_text_without_positions_has_no_output(module, batch, direction, pool):
    batch["attention_mask"][1] = 0
    output = DirectionOutput("block", direction, pool)
    assert output.output(module, batch).isnan().tolist() == [False, True, False]
    one = {name: part[1:2] for name, part in batch.items()}
    assert "none of its positions is in attention_mask" in output.explain_nan(module, one)
    assert output.explain_nan(module, {"input_ids": one["input_ids"]}) is None


def test_the_direction_is_a_copy(module, batch, direction):
    output = DirectionOutput("block", direction)
    before, fingerprint = output.output(module, batch), output.fingerprint()
    direction.neg_()
    assert torch.equal(output.output(module, batch), before)
    assert output.fingerprint() == fingerprint != DirectionOutput("block", direction).fingerprint()
    assert output.fingerprint() != DirectionOutput("block", -direction, "last").fingerprint()


def test_layers_that_cannot_be_read_are_refused(module, batch, direction):
    with pytest.raises(ValueError, match=r"layer 'blocks' is no module of Texts, which has: embedding, block, head"):
        DirectionOutput("blocks", direction).output(module, batch)
    twice = nn.Sequential(linear := nn.Linear(4, 4), linear).double()
    with pytest.raises(ValueError, match="layer '0' is called 2 times"):
        DirectionOutput("0", direction).output(twice, torch.randn(2, 4, dtype=torch.float64))
    unused = DirectionOutput("head", direction, forward=lambda module, batch: module.embedding(batch["input_ids"]))
    with pytest.raises(ValueError, match="layer 'head' is called 0 times"):
        unused.output(module, batch)
    with pytest.raises(TypeError, match="layer '' returned a dict"):
        DirectionOutput("", direction).output(module, batch)
    assert not any(part._forward_hooks for part in module.modules())


def test_what_does_not_fit_is_refused(module, batch, direction):
    with pytest.raises(ValueError, match=r"activations of shape \('batch', 3\).*received \(3, 4\) after pooling"):
        DirectionOutput("block", direction[:3]).output(module, batch)
    blind = DirectionOutput("block", direction, forward=lambda module, batch: module(batch["input_ids"]))
    with pytest.raises(ValueError, match=r"attention_mask should have shape \(3, 5\), not \(3, 4\)"):
        blind.output(module, batch | {"attention_mask": torch.ones(3, 4)})
    with pytest.raises(ValueError, match="pool='last' cannot reduce activations of shape"):
        DirectionOutput("", torch.randn(2), "last").output(nn.Identity(), torch.randn(3, 2, 4, 4))
    with pytest.raises(ValueError, match="pool must be one of 'mean', 'last'"):
        DirectionOutput("block", direction, "first")


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.zeros(4), "not all zero"),
        (torch.tensor([1.0, torch.nan]), "finite numbers"),
        (torch.ones(4, dtype=torch.long), r"Tensor of floats .*received torch.int64 of shape \(4,\)"),
        (torch.tensor(1.0), r"received torch.float32 of shape \(\)"),
        ([1.0, 2.0], "received list"),
    ],
)
def test_bad_directions_are_refused(direction, message):
    with pytest.raises(ValueError, match=message):
        DirectionOutput("block", direction)
