"""Private names of other libraries: each does what it is used for."""

import copy
import random
import signal
from contextlib import suppress

import lightning as L
import lightning_fabric
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.fabric import Fabric
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import _common_utils as fsdp
from torch.utils.data import DataLoader

from lightning_trak import compatibility
from tests.lit import TARGETS, TRAIN, make_model, make_trainer

# ---- Each name is there ----


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


# ---- Each does what it is used for: PyTorch ----


def test_compiled_modules_and_functions():
    plain = net()
    compiled = torch.compile(plain)
    assert compatibility.original_module(compiled) is plain
    assert compatibility.original_module(plain) is plain
    for other, name in ((plain.state_dict(), "OrderedDict"), (nn.Linear, "the class Linear")):
        with pytest.raises(TypeError, match=f"expected the model as an nn.Module, got {name}; weights are"):
            compatibility.original_module(other)
    assert compatibility.original_function(torch.compile(net)) is net
    assert compatibility.original_function(net) is net
    assert compatibility.is_compiled(compiled)
    assert compatibility.is_compiled(nn.Sequential(compiled))
    assert not compatibility.is_compiled(plain)
    plain[0].compile()
    assert compatibility.is_compiled(plain)
    compatibility.forget_compiled_call(plain[0])
    assert not compatibility.is_compiled(plain)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_orthogonalized_as_by_muon():
    parameter, gradient = nn.Parameter(torch.zeros(5, 4)), torch.randn(5, 4)
    parameter.grad = gradient.clone()
    optimizer = torch.optim.Muon([parameter], lr=1, weight_decay=0, momentum=0, nesterov=False)
    optimizer.step()
    (group,) = optimizer.param_groups
    expected = compatibility.muon_orthogonalized(gradient, group["ns_coefficients"], group["ns_steps"], group["eps"])
    torch.testing.assert_close(-parameter.detach() / (5 / 4) ** 0.5, expected.float())


@pytest.mark.parametrize(("trainings", "own"), [(1, False), (2, False), (1, True)])
def test_autocast_that_accelerate_leaves(trainings, own):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # of another test in this process
    plain, inputs = net(), torch.randn(5, 3)
    if own:
        plain.forward = lambda x, inner=plain.forward: 2 * inner(x)
    expected = plain(inputs)
    for _ in range(trainings):
        accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(plain)
    assert not torch.equal(plain(inputs), expected)  # it is rounded
    assert "_original_forward" in vars(plain)
    for _ in range(2):  # the second time there is nothing left to undo
        compatibility.forget_autocast(plain)
        assert torch.equal(plain(inputs), expected)
        assert ("forward" in vars(plain)) == own


def test_wrappers():
    compiled, checkpointed = torch.compile(net()), checkpoint_wrapper(net())
    assert {name.split(".")[0] for name, _ in compiled.named_parameters()} == {"_orig_mod"}
    found = {name for module in (compiled, checkpointed) for name, _ in module.named_children()}
    assert found | {fsdp.FSDP_WRAPPED_MODULE} == compatibility.WRAPPERS


def test_extra_state():
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return 1

    names = nn.Sequential(Stateful(1, 1, bias=False)).state_dict()
    assert set(names) == {"0.weight", f"0.{compatibility.EXTRA_STATE}"}


def test_what_is_registered():
    module = nn.Linear(1, 1, bias=False)
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("lost", torch.zeros(1), persistent=False)
    module.register_module("missing", None)
    found = compatibility.registered(module)
    assert list(found) == ["weight", "bias", "kept", "lost", "missing"]
    assert found["weight"] is module.weight
    assert found["bias"] is None
    assert found["missing"] is None
    assert compatibility.transient_buffers(module) == {"lost"}
    assert compatibility.transient_buffers(nn.Sequential(module)) == set()


def test_hooks_of_a_module():
    module = nn.Linear(1, 1)
    assert not any(compatibility.hooks_of(module).values())

    def hook(*args):
        return None

    module.register_forward_pre_hook(hook)
    module.register_forward_hook(hook)
    module.register_full_backward_pre_hook(hook)
    handle = module.register_full_backward_hook(hook)
    kinds = ["forward pre hooks", "forward hooks", "backward pre hooks", "backward hooks"]
    assert compatibility.hooks_of(module) == {kind: [hook] for kind in kinds}
    handle.remove()
    assert compatibility.hooks_of(module)["backward hooks"] == []


def test_hooks_on_a_tensor():
    parameter = nn.Parameter(torch.zeros(1))
    assert not compatibility.has_gradient_hooks(parameter)
    handle = parameter.register_hook(lambda gradient: gradient)
    assert compatibility.has_gradient_hooks(parameter)
    handle.remove()
    assert not compatibility.has_gradient_hooks(parameter)


def test_a_function_is_applied_to_all_tensors():
    module = net()
    weight = module[0].weight
    weight.grad = torch.zeros_like(weight)
    compatibility.apply_to_tensors(module, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert module[0].weight is weight
    assert {tensor.dtype for tensor in (*module.parameters(), weight.grad, module[1].running_mean)} == {torch.float64}
    assert module[1].num_batches_tracked.dtype == torch.int64


def test_a_parameter_is_replaced_for_a_while():
    module, inputs = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
    own = module.weight
    with suppress(ArithmeticError), compatibility.replaced_parameter(module, "weight", torch.tensor([[1.0, 2.0]])):
        assert float(module(inputs)) == 3
        raise ArithmeticError
    assert module.weight is own


@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"])
def test_padding_in_numbers(padding):
    torch.manual_seed(0)
    convolution, inputs = nn.Conv2d(1, 1, (4, 3), padding=padding), torch.randn(1, 1, 6, 6)
    padded = F.pad(inputs, compatibility.explicit_padding(convolution))
    assert torch.allclose(convolution(inputs), F.conv2d(padded, convolution.weight, convolution.bias), atol=1e-6)


def test_trees():
    tree = {"a": [torch.ones(1), 2], "b": (torch.zeros(1),)}
    assert len(list(compatibility.tree_iter(tree))) == 3
    assert compatibility.tree_map(lambda leaf: float(leaf) + 1, tree) == {"a": [2, 3], "b": (1,)}


def test_operations_are_seen():
    class Names(compatibility.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names() as names:
        torch.ones(1) + torch.ones(1)
    assert "aten.add.Tensor" in names.seen


def test_tensors_that_consist_of_others():
    jagged = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    assert compatibility.is_traceable_wrapper_subclass(jagged)
    assert not compatibility.is_traceable_wrapper_subclass(torch.ones(1))


# ---- Each does what it is used for: Lightning ----


def test_how_processes_are_made():
    trainers = [make_trainer(strategy="ddp_spawn", devices=2), make_trainer(strategy="ddp", devices=2), make_trainer()]
    assert list(map(compatibility.start_method, trainers)) == ["spawn", None, None]
    assert list(map(compatibility.starts_script_again, trainers)) == [False, True, False]


@pytest.mark.parametrize(("given", "found"), [("auto", 2), (1, 1)])
def test_tensor_parallel_size(given, found):
    trainer = make_trainer(strategy=ModelParallelStrategy(tensor_parallel_size=given), devices=2)
    assert compatibility.tensor_parallel_size(trainer.strategy) == found


def test_device_mesh():
    module, mesh = L.LightningModule(), object()
    compatibility.set_device_mesh(module, mesh)
    assert module.device_mesh is mesh


def test_a_trainer_that_is_running():
    class Asking(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            self.amid = compatibility.is_running(trainer)

        def on_validation_batch_start(self, trainer, *args):
            self.validating = compatibility.is_running(trainer)

        def on_fit_end(self, trainer, pl_module):
            self.after = compatibility.is_running(trainer)

    asking = Asking()
    trainer = make_trainer(max_epochs=1, callbacks=[asking])
    assert not compatibility.is_running(trainer)
    trainer.fit(make_model(), DataLoader(TRAIN, batch_size=25))
    assert (asking.amid, asking.after, compatibility.is_running(trainer)) == (True, False, False)
    trainer.validate(Validated(), DataLoader(TRAIN, batch_size=25), verbose=False)
    assert asking.validating


class Validated(L.LightningModule):
    def validation_step(self, batch):
        return None


def test_what_a_run_changes_is_put_back():
    trainer = make_trainer()
    parts = compatibility.parts_that_a_run_changes(trainer)
    before = [dict(vars(part)) for part in parts]
    trainer.validate(Validated(), DataLoader(TRAIN, batch_size=25), verbose=False)
    changed = {type(part).__name__ for part, held in zip(parts, before, strict=True) if dict(vars(part)) != held}
    assert changed >= {"Trainer", "_DataLoaderSource", "_EvaluationLoop"}
    for part, held in zip(parts, before, strict=True):
        vars(part).clear()
        vars(part).update(held)
    assert trainer.val_dataloaders is None
    assert len({id(part) for part in parts}) == len(parts)


def test_after_lightnings_signal_handlers():
    before, found = signal.getsignal(signal.SIGTERM), []
    trainer = make_trainer()
    compatibility.after_signal_handlers(trainer, lambda: found.append(signal.getsignal(signal.SIGTERM)))
    trainer.validate(Validated(), DataLoader(TARGETS), verbose=False)
    assert len(found) == 1
    assert found[0] != before
    assert signal.getsignal(signal.SIGTERM) == before


def set_up(model):
    return Fabric(accelerator="cpu", devices=1).setup(model, torch.optim.SGD(model.parameters(), 0.1))


def test_what_fabric_wraps():
    for kind in (Fabric, lightning_fabric.Fabric):
        plain = net()
        made = torch.optim.SGD(plain.parameters(), 0.1)
        model, optimizer = kind(accelerator="cpu", devices=1).setup(plain, made)
        assert compatibility.original_module(model) is plain
        assert compatibility.original_module(torch.compile(model)) is plain
        assert compatibility.original_optimizer(optimizer) is made
        assert compatibility.original_optimizer(made) is made
    model, _ = set_up(torch.compile(plain))
    assert compatibility.original_module(model) is plain


def test_what_fabric_leaves_on_a_lightning_module():
    module = make_model()
    assert compatibility.left_by_fabric(module) == []
    _, optimizer = set_up(module)
    fabric, optimizers = compatibility.left_by_fabric(nn.Sequential(module))
    assert isinstance(fabric, Fabric)
    assert optimizers == [optimizer]


def test_what_a_call_of_training_step_leaves():
    module = make_model()
    model, _ = set_up(torch.compile(module, backend="eager"))
    model.training_step(TRAIN[:5])
    assert "forward" in vars(module)
    compatibility.forget_redirection(module)
    assert "forward" not in vars(module)
    module.forward = net().forward  # not its own
    compatibility.forget_redirection(module)
    assert "forward" in vars(module)


def test_a_barrier_without_other_processes():
    with compatibility.InfiniteBarrier() as barrier:
        barrier()


def test_random_states():
    def draw():
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    states = compatibility.collect_rng_states()
    first = draw()
    assert draw() != first
    compatibility.set_rng_states(states)
    assert draw() == first


def test_optimizers_and_schedulers():
    optimizer = torch.optim.SGD(net().parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizers, schedulers, monitor = compatibility.configure_optimizers(([optimizer], [scheduler]))
    assert (optimizers, schedulers, monitor) == ([optimizer], [scheduler], None)
    (config,) = compatibility.configure_schedulers(schedulers, monitor)
    assert (config.scheduler, config.interval) == (scheduler, "epoch")


# ---- Each does what it is used for: jsonargparse ----


def test_an_option_without_completion():
    parser = ArgumentParser()
    action = parser.add_argument("--model")
    compatibility.skip_completion(parser, "--model")
    assert action.complete == {}  # of which shtab makes no choices


def test_names_of_options():
    parser = ArgumentParser()
    parser.add_argument("--model")
    assert {"--model", "model"} <= compatibility.option_names(parser)


def test_a_loader_draws_from_a_changed_sampler():
    drawn = []

    class Noting:
        def __init__(self, sampler):
            self.sampler = sampler

        def __iter__(self):
            for positions in self.sampler:
                drawn.append(positions)
                yield positions

    loader = DataLoader(range(5), batch_size=2)
    changed = compatibility.with_index_sampler(copy.copy(loader), Noting)
    assert [batch.tolist() for batch in changed] == drawn == [[0, 1], [2, 3], [4]]
    assert [batch.tolist() for batch in loader] == drawn
    assert len(drawn) == 3
    assert type(loader) is DataLoader
    assert changed.batch_sampler is loader.batch_sampler


def test_a_trainer_uses_a_changed_loader():
    seen = []

    class Changing(L.Callback):
        def setup(self, trainer, module, stage):
            compatibility.change_train_loader(trainer, lambda loader: seen.append(loader) or copy.copy(loader))

        def on_train_start(self, trainer, module):
            seen.append(trainer.train_dataloader)

        def teardown(self, trainer, module, stage):
            compatibility.restore_train_loader(trainer)

    loader = DataLoader(TRAIN, batch_size=25)
    trainer = make_trainer(max_epochs=1, callbacks=[Changing()])
    source = type(trainer.fit_loop._data_source)
    trainer.fit(make_model(), loader)
    assert seen[0] is loader
    assert seen[1] is not loader
    assert type(trainer.fit_loop._data_source) is source


def test_a_refused_loader_leaves_the_class_of_loaders_as_it_was():
    class Refusing(L.Callback):
        def setup(self, trainer, module, stage):
            def refuse(loader):
                assert DataLoader.__init__ is not before[0]  # Lightning has replaced it
                raise ValueError("refused")

            compatibility.change_train_loader(trainer, refuse)

    names = "__init__", "__setattr__", "__delattr__"
    before = [getattr(DataLoader, name) for name in names]
    with pytest.raises(ValueError, match="refused"):
        make_trainer(max_epochs=1, callbacks=[Refusing()]).fit(make_model(), DataLoader(TRAIN, batch_size=25))
    assert [getattr(DataLoader, name) for name in names] == before
    assert not any("__old" in name for name in vars(DataLoader))
