"""Hooks leave the user's module as it was."""

import copy

import pytest
import torch
from torch import nn

from lightning_trak.gradients import HookEngine, LoopEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from tests.gradients.no_hooks import assert_no_hooks, attributes
from tests.zoo import specimen


@pytest.mark.parametrize("name", ["conv_batchnorm", "convolutions", "reuse"])
def test_the_module_is_left_as_it_was(name):
    module, output, batch, size = specimen(name)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(module.parameters()).requires_grad_(False)
    state = copy.deepcopy(module.state_dict())
    flags = [parameter.requires_grad for parameter in module.parameters()]
    before, names = attributes(module), select_parameters(module)
    engine = HookEngine(module, output, names)
    shapes = {key: parameter.shape for key, parameter in engine.parameters.items()}
    engine(ExampleBatch(batch, size))
    engine.project(
        ExampleBatch(batch, size), SparseProjection(16).bind(shapes, 0, 0, torch.device("cpu")), torch.zeros(size, 16)
    )
    engine.check(ExampleBatch(batch, size))
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in module.parameters()]
    assert all(bool((parameter.grad == 1).all()) for parameter in module.parameters())
    assert not any(part.training for part in module.modules())
    assert attributes(module) == before
    assert_no_hooks(module)


class _Keeping(nn.Module):
    """Keeps something of each batch on itself, in containers of all kinds and in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.found, self.known = {}, {"first": torch.ones(1)}
        self.sizes, self.shapes = [], {"none"}

    def forward(self, x):
        self.latest = x
        self.found["x"] = self.known["second"] = x
        self.sizes.append(len(x))
        self.shapes.add(x.shape)
        return self.linear(x)


@pytest.mark.parametrize("engine", [HookEngine, LoopEngine])
def test_what_a_forward_pass_keeps_on_the_module_is_removed(engine):
    module, first = _Keeping().eval(), torch.ones(1)
    module.known["first"] = first
    parameters = select_parameters(module)
    engine(module, ClassificationMargin(), parameters)(ExampleBatch((torch.randn(3, 4), torch.tensor([0, 1, 2])), 3))
    assert not hasattr(module, "latest")
    assert (module.found, module.sizes, module.shapes) == ({}, [], {"none"})
    assert list(module.known) == ["first"]
    assert module.known["first"] is first
    assert_no_hooks(module)


class _Failing(nn.Module):
    """Fails in the forward or in the backward pass of a batch of three: after those of one and two find the layout."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.where = where

    def forward(self, x):
        hidden = self.first(x)
        if len(x) > 2:
            if self.where == "forward":
                raise KeyError("broken forward")
            hidden.register_hook(self._fail)
        return self.second(hidden)

    def _fail(self, gradient):
        raise KeyError("broken backward")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_no_hook_survives_an_exception(where):
    module = _Failing(where)
    before = attributes(module)
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    with pytest.raises(KeyError, match=f"broken {where}"):
        engine(ExampleBatch((torch.randn(3, 4), torch.tensor([0, 1, 2])), 3))
    assert_no_hooks(module)
    assert attributes(module) == before
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_of_the_user_come_after():
    module, output, batch, size = specimen("mlp", torch.float64)
    module[0].register_forward_hook(lambda part, args, result: result.square())
    module[2].register_forward_pre_hook(lambda part, args: (args[0] + 1,))
    names = select_parameters(module)
    expected = LoopEngine(module, output, names)(ExampleBatch(batch, size))[1]
    torch.testing.assert_close(
        HookEngine(module, output, names)(ExampleBatch(batch, size))[1], expected, rtol=1e-10, atol=1e-10
    )
    assert len(module[0]._forward_hooks) == 1
