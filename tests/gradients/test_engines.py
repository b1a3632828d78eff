"""Engines against each other, against autograd over the whole batch, and against finite differences."""

from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_trak.gradients import FunctionalEngine, LoopEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch, find_layout, infer_batch_size
from lightning_trak.outputs import ClassificationMargin
from tests.nested import Pair, Record, nested
from tests.zoo import ZOO, specimen


@pytest.mark.parametrize("name", ZOO)
def test_engines_agree(name):
    module, output, batch, size = specimen(name)
    names = select_parameters(module)
    loop_values, loop = LoopEngine(module, output, names)(ExampleBatch(batch, size))
    values, functional = FunctionalEngine(module, output, names)(ExampleBatch(batch, size))
    torch.testing.assert_close(values, loop_values)
    assert list(functional) == list(loop) == list(names)
    for parameter in loop:
        scale = float(loop[parameter].abs().max())
        torch.testing.assert_close(functional[parameter], loop[parameter], rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("engine", [FunctionalEngine, LoopEngine])
@pytest.mark.parametrize("name", ZOO)
def test_sum_of_rows_is_the_gradient_of_the_summed_output(name, engine):
    module, output, batch, size = specimen(name)
    _, rows = engine(module, output, select_parameters(module))(ExampleBatch(batch, size))
    total = output.output(module, batch).sum()
    expected = torch.autograd.grad(total, list(module.parameters()), allow_unused=True, materialize_grads=True)
    for row, gradient in zip(rows.values(), expected, strict=True):
        torch.testing.assert_close(row.sum(0), gradient.flatten(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", [FunctionalEngine, LoopEngine])
def test_a_row_is_a_finite_difference_in_float64(engine):
    module, output, batch, size = specimen("mlp")
    module.double()
    batch = (batch[0].double(), batch[1])
    _, rows = engine(module, output, select_parameters(module))(ExampleBatch(batch, size))
    weight = module[0].weight
    with torch.no_grad():
        for i, j in ((0, 0), (3, 2), (11, 5)):
            kept = weight[i, j].item()
            weight[i, j] = kept + 1e-6
            above = output.output(module, batch)
            weight[i, j] = kept - 1e-6
            below = output.output(module, batch)
            weight[i, j] = kept
            torch.testing.assert_close(rows["0.weight"][:, i * 6 + j], (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", [FunctionalEngine, LoopEngine])
@pytest.mark.parametrize("name", ["conv_batchnorm", "gpt_tied"])
def test_the_module_is_left_as_it_was(name, engine):
    module, output, batch, size = specimen(name)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(module.parameters()).requires_grad_(False)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    flags = [parameter.requires_grad for parameter in module.parameters()]
    modules = dict(module.named_modules())
    engine(module, output, select_parameters(module))(ExampleBatch(batch, size))
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in module.parameters()]
    assert all(bool((parameter.grad == 1).all()) for parameter in module.parameters())
    assert modules == dict(module.named_modules())
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())


def test_loop_restores_flags_after_an_exception():
    module, output, batch, _ = specimen("mlp")
    with pytest.raises(ValueError, match="first dimension"):
        LoopEngine(module, output, select_parameters(module, "2.*"))(ExampleBatch(batch, 7))
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_parameters_that_the_forward_pass_freezes_are_refused():
    class Freezes(nn.Linear):
        def forward(self, inputs):
            self.bias.requires_grad_(False)
            return super().forward(inputs)

    module = Freezes(4, 3)
    engine = LoopEngine(module, ClassificationMargin(), select_parameters(module))
    with pytest.raises(ValueError, match=r"forward pass of Freezes turned requires_grad off for bias.*parameters="):
        engine(ExampleBatch((torch.ones(2, 4), torch.tensor([0, 2])), 2))
    assert module.bias.requires_grad


@pytest.mark.parametrize("engine", [FunctionalEngine, LoopEngine])
def test_only_selected_parameters_are_differentiated(engine, monkeypatch):
    module, output, batch, size = specimen("mlp")
    whole = engine(module, output, select_parameters(module))(ExampleBatch(batch, size))[1]
    touched: list[str] = []
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: touched.append(name))
    head = engine(module, output, select_parameters(module, "2.*"))(ExampleBatch(batch, size))[1]
    assert list(head) == ["2.weight", "2.bias"]
    torch.testing.assert_close(head["2.weight"], whole["2.weight"])
    assert not any(name.startswith("0.") for name in touched)


def test_frozen_parameters_can_be_selected_by_name():
    module, output, batch, size = specimen("mlp")
    whole = LoopEngine(module, output, select_parameters(module))(ExampleBatch(batch, size))[1]
    module.requires_grad_(False)
    frozen = LoopEngine(module, output, select_parameters(module, "0.*"))(ExampleBatch(batch, size))[1]
    torch.testing.assert_close(frozen["0.weight"], whole["0.weight"])


def test_selection_by_pattern():
    module = nn.ModuleDict({"base": nn.Linear(2, 2), "lora_a": nn.Linear(2, 1), "lora_b": nn.Linear(1, 2)})
    module["base"].requires_grad_(False)
    lora = ["lora_a.weight", "lora_a.bias", "lora_b.weight", "lora_b.bias"]
    assert list(select_parameters(module)) == lora
    assert list(select_parameters(module, "*lora*")) == lora
    assert list(select_parameters(module, ["base.*", "lora_b.bias"])) == ["base.weight", "base.bias", "lora_b.bias"]
    assert list(select_parameters(module, lambda name, parameter: parameter.numel() == 1)) == ["lora_a.bias"]
    with pytest.raises(ValueError, match=r"'head.\*' matches no parameter; the model has: base.weight"):
        select_parameters(module, ["base.*", "head.*"])
    with pytest.raises(ValueError, match=r"'base' matches no parameter; .*; did you mean 'base.\*'\?"):
        select_parameters(module, "base")
    with pytest.raises(TypeError, match=r"expected parameters as patterns for names, .* got Linear"):
        select_parameters(module, module["base"])
    with pytest.raises(ValueError, match="chose none"):
        select_parameters(module, lambda name, parameter: False)
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        select_parameters(module.requires_grad_(False))


def test_names_do_not_show_compilation():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled = nn.Sequential(torch.compile(module[0]), module[1])
    assert list(select_parameters(compiled)) == list(select_parameters(module))
    assert select_parameters(compiled)["0.weight"] == "0._orig_mod.weight"


def test_an_output_that_is_not_one_scalar_is_refused():
    class Wrong(ClassificationMargin):
        def output(self, module: nn.Module, batch: Any) -> Tensor:
            return module(batch[0])

    module, _, batch, size = specimen("mlp")
    for engine in (FunctionalEngine, LoopEngine):
        with pytest.raises(ValueError, match=r"Wrong.output returned shape \(1, 4\).*expected \(1,\)"):
            engine(module, Wrong(), select_parameters(module))(ExampleBatch(batch, size))


def test_an_output_without_gradient_has_a_gradient_of_zero():
    class Constant(ClassificationMargin):
        def output(self, module: nn.Module, batch: Any) -> Tensor:
            return batch[0].sum(1)

    module, _, batch, size = specimen("mlp")
    _, rows = LoopEngine(module, Constant(), select_parameters(module))(ExampleBatch(batch, size))
    assert [(len(row), float(row.abs().sum())) for row in rows.values()] == [(size, 0.0)] * len(rows)


def test_batches_of_many_structures_are_taken_apart():
    batch = nested(3)
    one = ExampleBatch(batch, 3, find_layout(nested(2), nested(3))).take([1]).fresh()
    assert isinstance(one["pair"], Pair)
    assert one["pair"].second == ["b"]
    assert one["pair"].first.tolist() == [1]
    assert one["record"] == Record(torch.tensor([2]), "shared")
    assert isinstance(one["ordered"], OrderedDict)
    assert one["ordered"]["x"][1][0].tolist() == [1]
    assert isinstance(one["user"], UserDict)
    assert one["user"]["y"].tolist() == [1]
    assert one["classes"] == ["cat", "dog", "emu"]
    assert [tuple(image.shape) for image in one["images"]] == [(2, 3)]
    assert one["height and width"] == (3, 3)
    assert one["weights"].tolist() == [1, 1, 1]
    assert one["temperature"] == 0.5
    assert one["plain"] == [1, 2.5, True, None, ("text", ())]
    assert infer_batch_size(batch) == 3


def test_user_code_gets_copies():
    batch = nested(3)
    examples = ExampleBatch(batch, 3, find_layout(nested(2), nested(3)))
    for fresh in (examples.fresh(), examples.take(slice(0, 2)).fresh(), examples.take([0]).fresh()):
        fresh["user"]["y"].sub_(7)
        fresh["images"][0].fill_(9)
        fresh["weights"].zero_()
        fresh["classes"].append("fox")
        del fresh["ordered"]["x"], fresh["pair"]
    assert batch["user"]["y"].tolist() == [0, 1, 2]
    assert batch["images"][0].sum() == 0
    assert batch["weights"].tolist() == [1, 1, 1]
    assert batch["classes"] == ["cat", "dog", "emu"]
    assert {"ordered", "pair"} <= set(batch)
    assert "x" in batch["ordered"]


def test_batches_that_cannot_be_taken_apart_are_refused():
    with pytest.raises(ValueError, match=r"batch\[1\] has shape \(4, 2\) in a batch of 3 examples"):
        ExampleBatch((torch.zeros(3), torch.zeros(4, 2)), 3).take([0])
    with pytest.raises(TypeError, match="cannot take examples out of a object"):
        ExampleBatch([object()], 2).take([0])
    with pytest.raises(ValueError, match="cannot tell how many examples"):
        infer_batch_size({"text": ["a", "b"]})
    with pytest.raises(ValueError, match=r"batch\['x'\] has shape \(5, 2\) in a batch of two examples and \(5, 3\)"):
        find_layout({"x": torch.zeros(5, 2)}, {"x": torch.zeros(5, 3)})
    sparse = torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match=r"batch\['x'\] is a sparse tensor.* let the collate_fn give a padded"):
        find_layout({"x": sparse}, {"x": sparse})
    ragged = torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"batch\[0\] is a nested tensor"):
        find_layout((ragged,), (ragged,))
    with pytest.raises(ValueError, match=r"batch\[1\] has as many items as the batch has examples"):
        ExampleBatch((torch.zeros(3), ["a", "b", "c"]), 3).take([0])
