"""All private names of PyTorch, Lightning, accelerate and jsonargparse that this package uses.

A new version of a library may drop a private name without notice. So each is used only here, behind a function or a
name that says what it is for. ``tests/repository/test_compatibility.py`` tries each with the installed version. If a
public name does the same, it is used instead.

This module lies below all others but ``packages``, because fingerprints, checkpoints and gradients need PyTorch's
private names, and ``running`` needs Lightning's. The only exception is ``metrics``, which does not import Lightning. It
uses names that torchmetrics has for classes derived from ``Metric`` (``_plot``, ``_is_synced``, ``_apply``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
from lightning.fabric.utilities.distributed import _InfiniteBarrier as InfiniteBarrier
from lightning.fabric.utilities.seed import _collect_rng_states as collect_rng_states
from lightning.fabric.utilities.seed import _set_rng_states as set_rng_states
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from lightning.pytorch.core.optimizer import _configure_optimizers as configure_optimizers
from lightning.pytorch.core.optimizer import _configure_schedulers_automatic_opt as configure_schedulers
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning_utilities.core.inheritance import get_all_subclasses
from torch import Tensor, nn, optim
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside_vmap
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.data import BatchSampler, DataLoader

from lightning_trak.packages import is_a, own

__all__ = [
    "EXTRA_STATE",
    "WRAPPERS",
    "BatchNorm",
    "InfiniteBarrier",
    "TorchDispatchMode",
    "after_signal_handlers",
    "apply_to_tensors",
    "change_train_loader",
    "collect_rng_states",
    "configure_optimizers",
    "configure_schedulers",
    "drawn_batches",
    "explicit_padding",
    "forget_autocast",
    "forget_compiled_call",
    "forget_redirection",
    "has_gradient_hooks",
    "hooks_of",
    "is_compiled",
    "is_running",
    "is_traceable_wrapper_subclass",
    "left_by_fabric",
    "muon_orthogonalized",
    "option_names",
    "original_function",
    "original_module",
    "original_optimizer",
    "outside_vmap",
    "parts_that_a_run_changes",
    "registered",
    "replaced_parameter",
    "restore_train_loader",
    "set_device_mesh",
    "set_rng_states",
    "skip_completion",
    "start_method",
    "starts_script_again",
    "tensor_parallel_size",
    "transient_buffers",
    "tree_iter",
    "tree_map",
    "values_under_vmap",
    "with_index_sampler",
]

# PyTorch

_BEFORE_AUTOCAST = "_original_forward"
_COMPILED = "_orig_mod"

WRAPPERS = frozenset({_COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""The names under which torch.compile, FSDP and activation checkpointing keep the module that they wrap."""

EXTRA_STATE = "_extra_state"
"""The last part of a name in a state dict, for the result of ``get_extra_state()``."""

_HOOKS = {
    "forward pre hooks": "_forward_pre_hooks",
    "forward hooks": "_forward_hooks",
    "backward pre hooks": "_backward_pre_hooks",
    "backward hooks": "_backward_hooks",
}


def original_module(model: nn.Module) -> nn.Module:
    """The model that was given to ``torch.compile`` or ``fabric.setup``; otherwise the model itself.

    Raises:
        TypeError: if it is not a module.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"expected the model as an nn.Module, got {kind}; weights are passed apart, as checkpoints")
    while True:
        original = model.module if is_a(model, _FabricModule) else getattr(model, _COMPILED, None)
        if not isinstance(original, nn.Module):
            return model
        model = original


def original_optimizer(optimizer: Any) -> Any:
    """The optimizer that was given to ``fabric.setup``; otherwise the optimizer itself."""
    return optimizer.optimizer if is_a(optimizer, _FabricOptimizer) else optimizer


def muon_orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix as ``torch.optim.Muon`` orthogonalizes it, bfloat16. The options are Muon's ``ns_...`` and ``eps``."""
    return optim._muon._zeropower_via_newtonschulz(matrix, coefficients, steps, eps)


def original_function(function: Any) -> Any:
    """The function that was given to ``torch.compile``, if it is compiled; otherwise the function itself."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(part)`` or ``part.compile()`` was called on any part of a module."""
    return any(_COMPILED in part._modules or part._compiled_call_impl for part in module.modules())


def forget_compiled_call(module: nn.Module) -> None:
    """Undo ``module.compile()``, but not that of its parts. Compiled code in a copy would run the original."""
    module._compiled_call_impl = None


def forget_autocast(module: nn.Module) -> None:
    """Undo what accelerate leaves on a model that was trained in mixed precision: a ``forward()`` with autocast.

    The Trainer of Hugging Face trains with accelerate.
    """
    original = vars(module).pop(_BEFORE_AUTOCAST, None)
    if original is None:
        return
    inner, own = module.forward, type(module).forward
    while inner is not own and hasattr(inner, "__wrapped__"):  # it may have been trained several times
        inner = inner.__wrapped__
    if inner is own:
        del module.forward
    else:
        module.forward = original


def registered(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters, buffers and submodules by name, including those that are None."""
    return {**module._parameters, **module._buffers, **module._modules}


def transient_buffers(module: nn.Module) -> set[str]:
    """The names of the module's own buffers that are not in its state dict (``persistent=False``)."""
    return module._non_persistent_buffers_set


def hooks_of(module: nn.Module) -> dict[str, list[Callable[..., Any]]]:
    """The hooks on the module itself, in the order in which they are called.

    Returns:
        Lists under ``"forward pre hooks"``, ``"forward hooks"``, ``"backward pre hooks"`` and ``"backward hooks"``.
    """
    return {kind: list(getattr(module, attribute).values()) for kind, attribute in _HOOKS.items()}


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether ``tensor.register_hook`` was called, and its hook was not removed."""
    return bool(tensor._backward_hooks)


def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace all parameters, their gradients and all buffers in place, as ``module.to`` does.

    Args:
        module: the module. Other tensors that its parts keep, such as the states of metrics, are replaced too.
        function: maps an old tensor to the new one.
    """
    module._apply(function)  # type: ignore[no-untyped-call]


@contextmanager
def replaced_parameter(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let a module use a tensor in place of one of its own parameters.

    Args:
        module: the module. Its hooks and its state dict see the tensor too.
        name: name of the parameter, without dots.
        value: the tensor, which may or may not be a parameter.
    """
    own = module._parameters[name]
    module._parameters[name] = cast(nn.Parameter, value)
    try:
        yield
    finally:
        module._parameters[name] = own


def explicit_padding(convolution: nn.Module) -> list[int]:
    """The padding of a convolution, as ``torch.nn.functional.pad`` takes it: before and after, last dimension first.

    Args:
        convolution: a convolution of ``torch.nn``. ``padding="same"`` is converted to numbers.
    """
    return list(cast(Any, convolution)._reversed_padding_repeated_twice)


def values_under_vmap(tensor: Tensor) -> Tensor | None:
    """The values for all examples, ``(size, ...)``, of a tensor that ``vmap`` computes, perhaps with ``grad``.

    None if they are the same for all examples, or belong to ``vmap`` inside ``vmap``. Read them :data:`outside_vmap`.
    """
    found, mapped = tensor, []
    while functorch.is_functorch_wrapped_tensor(found):
        axis, found = functorch.maybe_get_bdim(found), functorch.get_unwrapped(found)
        mapped += [axis] if axis >= 0 else []
    return found.detach().movedim(mapped[0], 0) if len(mapped) == 1 else None


def with_index_sampler(loader: Any, change: Callable[[Any], Any]) -> Any:
    """Let a DataLoader draw from a changed sampler, and give it no other attributes.

    Args:
        loader: a copy of the user's loader. It gets a class of its own.
        change: maps the sampler that the loader draws from, which is its batch sampler, to another.
    """

    class _Changed(type(loader)):  # type: ignore[misc]
        @property
        def _index_sampler(self) -> Any:
            return change(super()._index_sampler)

    _Changed.__name__, _Changed.__qualname__ = type(loader).__name__, type(loader).__qualname__
    loader.__class__ = _Changed
    return loader


# Lightning


def drawn_batches(loader: Any) -> list[list[int]] | None:
    """The dataset positions of the batches that a Trainer has drawn so far from a loader for prediction.

    Returns:
        A list for each batch; None if Lightning has not noted them.
    """
    drawn: list[list[int]] | None = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)
    return drawn or None


class _ChangedSource:
    """A source of a Trainer's loaders that passes each one through a function."""

    def __init__(self, source: Any, change: Callable[[Any], Any]) -> None:
        self.source = source
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def dataloader(self) -> Any:
        try:
            return self._change(self.source.dataloader())
        except BaseException:
            _undo_loader_patch()
            raise


def _undo_loader_patch() -> None:
    """Give classes of loaders their own methods back.

    Lightning replaces these methods while it asks for loaders, and does not put them back after an error.
    """
    for base in (DataLoader, BatchSampler):
        for kind in get_all_subclasses(base) | {base}:
            for name in ("__init__", "__setattr__", "__delattr__"):
                if f"__old{name}" in vars(kind):
                    setattr(kind, name, vars(kind)[f"__old{name}"])
                    delattr(kind, f"__old{name}")


def change_train_loader(trainer: L.Trainer, change: Callable[[Any], Any]) -> None:
    """Let a Trainer that has its data, but no loaders yet, train on what a function makes of its loader."""
    trainer.fit_loop._data_source = cast(Any, _ChangedSource(trainer.fit_loop._data_source, change))


def restore_train_loader(trainer: L.Trainer) -> None:
    """Undo :func:`change_train_loader`."""
    source: Any = trainer.fit_loop._data_source
    if isinstance(source, _ChangedSource):
        trainer.fit_loop._data_source = source.source


def start_method(trainer: L.Trainer) -> str | None:
    """How a Trainer's strategy starts processes from this one, such as ``"spawn"``; None if it starts none."""
    launcher = trainer.strategy.launcher
    return launcher._start_method if is_a(launcher, _MultiProcessingLauncher) else None


def starts_script_again(trainer: L.Trainer) -> bool:
    """Whether a Trainer's strategy starts the user's script again for each further process."""
    return is_a(trainer.strategy.launcher, _SubprocessScriptLauncher)


def tensor_parallel_size(strategy: ModelParallelStrategy) -> int:
    """The number of devices over which a strategy splits layers. It is known before the processes run."""
    size = strategy._tensor_parallel_size
    return strategy.num_processes if size == "auto" else size


def left_by_fabric(module: nn.Module) -> list[object]:
    """What ``fabric.setup`` has left on LightningModules: Fabric itself, and its wrapped optimizers."""
    parts = [part for part in module.modules() if is_a(part, L.LightningModule) and part._fabric is not None]
    return [left for part in parts for left in (part._fabric, part._fabric_optimizers)]


def forget_redirection(module: nn.Module) -> None:
    """Undo what calls of ``training_step`` of a Fabric model leave on its module: its own ``forward`` as attribute."""
    forward: Any = vars(module).get("forward")
    if forward is None:  # then a scripted module's class may have none to compare with
        return
    if getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module:
        del module.forward


def set_device_mesh(module: L.LightningModule, mesh: Any) -> None:
    """Set ``self.device_mesh`` of a module, as ``ModelParallelStrategy`` does.

    Args:
        module: the module.
        mesh: a DeviceMesh, or None.
    """
    module._device_mesh = mesh


def _loops(trainer: L.Trainer) -> list[Any]:
    validation = trainer.fit_loop.epoch_loop.val_loop
    return [trainer.fit_loop, validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]


def is_running(trainer: L.Trainer) -> bool:
    """Whether a Trainer is in one of its loops. In ``on_fit_end`` it is not, although its state is still "running"."""
    return any(loop._data_fetcher is not None for loop in _loops(trainer))


def parts_that_a_run_changes(trainer: L.Trainer) -> list[object]:
    """The Trainer and its parts whose attributes are changed by a run."""
    parts = [trainer, trainer.state, trainer._data_connector, trainer._logger_connector]
    loops = _loops(trainer)
    return [*parts, *loops, *(loop._data_source for loop in loops)]


def after_signal_handlers(trainer: L.Trainer, action: Callable[[], None]) -> None:
    """Call an action each time that Lightning has installed its signal handlers, which happens in every run.

    Args:
        trainer: the Trainer. It gets another signal connector.
        action: the function to call.
    """
    kind = own(_SignalConnector, trainer._signal_connector)

    class _ThenSignalConnector(kind):  # type: ignore[misc, valid-type]
        def register_signal_handlers(self) -> None:
            super().register_signal_handlers()
            action()

    trainer._signal_connector = _ThenSignalConnector(trainer)


# jsonargparse


def skip_completion(parser: Any, option: str) -> None:
    """Stop completion scripts of shells from offering values for an option.

    Args:
        parser: an ``ArgumentParser`` of jsonargparse, or of a derived class.
        option: the option, such as ``"--model"``.
    """
    parser._option_string_actions[option].complete = {}


def option_names(parser: Any) -> set[str]:
    """The names of the options and arguments of an ``ArgumentParser``, such as ``"--model"`` and ``"model"``."""
    return {name for action in parser._actions for name in (*action.option_strings, action.dest)}
