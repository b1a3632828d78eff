"""Copies of the user's module, and loading weights into them. All work is done on such copies."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.digests import frozen_digest
from lightning_trak.checkpoints.names import canonical_name, named_tensors
from lightning_trak.checkpoints.weights import is_extra_state
from lightning_trak.compatibility import (
    forget_autocast,
    forget_compiled_call,
    forget_redirection,
    has_gradient_hooks,
    left_by_fabric,
    set_device_mesh,
    transient_buffers,
    tree_iter,
)
from lightning_trak.packages import is_a
from lightning_trak.running.fsdp import is_sharded, shard_like
from lightning_trak.running.training_step import silence
from lightning_trak.texts.messages import listed

_told = WarningCache()  # gives each warning once
_NAMED = 8  # tensors in a message


def copy_module(module: nn.Module, configure: bool = True) -> nn.Module:
    """Copy the user's module. All work is done on the copy.

    Args:
        module: the user's module.
        configure: whether to call the copy's ``configure_model()`` if it is a LightningModule.

    Raises:
        ValueError: if the module cannot be copied, if it cannot be configured without a device mesh, or if it has
            tensors without content.
    """
    _require_copyable(module)
    with torch.inference_mode(False):  # the copy is differentiated later
        return _copied(module, configure)


def _copied(module: nn.Module, configure: bool) -> nn.Module:
    copied = _deepcopied(module)
    for part in copied.modules():
        # A LightningModule keeps the result of compile(), and that would run the original.
        forget_compiled_call(part)
        forget_autocast(part)
        forget_redirection(part)
        if is_a(part, L.LightningModule):
            silence(part)  # a loss may call its training step, and Lightning refuses logs in ``predict``
    for parameter in copied.parameters():
        parameter.grad = None
    if configure:
        _configure(copied)
    return copied


def _require_copyable(module: nn.Module) -> None:
    name = type(module).__name__
    lazy = [key for key, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"this {name} has parameters that are not initialized yet: {listed(lazy, _NAMED)}; run a batch through it"
            " first"
        )
    hooked = [key for key, parameter in module.named_parameters() if has_gradient_hooks(parameter)]
    if hooked:
        raise ValueError(
            f"parameters of {name} have gradient hooks: {listed(hooked, _NAMED)}; attribution works on a copy, which"
            " has no such hooks, so its gradients may differ from those of training; remove the hooks, or leave these"
            " parameters out with parameters="
        )
    scripted = _scripted(module)
    if scripted:
        raise ValueError(
            f"parts of {name} were compiled by torch.jit, which does not let them be copied and differentiated:"
            f" {listed(scripted, _NAMED)}; pass a model of plain modules with the same weights"
        )
    if any(is_sharded(parameter) for parameter in module.parameters()):
        raise ValueError(
            f"this {name} is sharded, perhaps by training, and a sharded module cannot be copied; pass a new {name}"
            " whose configure_model() has not been called; the weights come from the checkpoints"
        )


def _deepcopied(module: nn.Module) -> nn.Module:
    """A deepcopy that shares no tensors with the module."""
    name = type(module).__name__
    try:
        # torch cannot deepcopy every kind of sparse tensor.
        sparse = {id(buffer): buffer.clone() for buffer in module.buffers() if buffer.layout != torch.strided}
        left = {id(wrapper): None for wrapper in left_by_fabric(module)}
        copied: nn.Module = copy.deepcopy(module, sparse | computed(module) | left)
    except Exception as error:
        raise ValueError(
            f"attribution works on a copy of the model, but {name} cannot be copied: {error}; remove"
            " tensors with gradients, locks and open files from its attributes"
        ) from error
    addresses = {tensor.data_ptr() for _, tensor in _plain_tensors(module)}
    shared = [key for key, tensor in _plain_tensors(copied) if tensor.data_ptr() in addresses]
    if shared:
        raise ValueError(
            f"attribution works on a copy of the model, but a deepcopy of {name} shares tensors with it:"
            f" {listed(shared, _NAMED)}; change __deepcopy__ so that it copies tensors too"
        )
    return copied


def computed(module: nn.Module) -> dict[int, Tensor]:
    """Copies of what earlier forward passes have computed and left on the module, by the id of the tensor.

    It is a memo for ``copy.deepcopy``, which cannot copy tensors with their graphs. Weights that are computed from
    others, as by ``torch.nn.utils.weight_norm``, are among them. The copies are leaves that require gradients: if an
    output depends on one, and does not compute it again, it is refused as a tensor that is no parameter.
    """
    kept = (value for part in module.modules() for value in tree_iter(dict(vars(part))))
    return {
        id(value): value.detach().clone().requires_grad_()
        for value in kept
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _configure(module: nn.Module) -> None:
    """Call ``configure_model()`` of a LightningModule. After that, all tensors must have content."""
    name = type(module).__name__
    if is_a(module, L.LightningModule):
        set_device_mesh(module, None)
        try:
            module.configure_model()
        except TypeError as error:
            if "'NoneType' object is not subscriptable" not in str(error):
                raise
            raise ValueError(
                f"{name}.configure_model() fails without a device mesh: {error}; let it return early if"
                " self.device_mesh is None, or use a Trainer with ModelParallelStrategy"
            ) from error
    empty = [key for key, (_, tensor) in named_tensors(module).items() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"this {name} has tensors on the meta device, without content: {listed(empty, _NAMED)}; pass a model whose"
            " tensors are in memory, for example model.to_empty(device='cpu'): the checkpoints are loaded into them"
        )


class Original:
    """The state of a copy of the user's module before any checkpoint was loaded.

    A checkpoint may hold only part of the state. No state dict has buffers that are not persistent. A model with
    ``strict_loading = False`` may have saved only some of its weights, such as adapters. The other tensors must have
    the values of the user's module, not those of the checkpoint that was loaded before. So each checkpoint is loaded
    on top of this state. Only the tensors that may be needed are kept: if checkpoints must be complete, no weights.

    Args:
        module: a copy of the user's module that has not been changed yet.
        everything: whether to keep the whole state, for :meth:`restore`.
        partial: whether a checkpoint may leave out parameters, see :meth:`load`.
    """

    def __init__(self, module: nn.Module, everything: bool = False, partial: bool = False) -> None:
        self._module = module
        self._strict = bool(getattr(module, "strict_loading", True))
        self._overridden = type(module).load_state_dict is not nn.Module.load_state_dict  # may load only a part
        self._complete = self._strict and not self._overridden and not partial
        tensors = named_tensors(module)
        self._without_content = [name for name, (_, tensor) in tensors.items() if tensor.is_meta]
        self._kept: dict[str, Tensor] = {}
        extra = {key: value for key, value in module.state_dict().items() if is_extra_state(key)} if everything else {}
        self._extra_state = copy.deepcopy(extra)
        self._keep(tensors if everything else _transient(module) if self._complete else dict(module.named_buffers()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the state that is kept. A buffer whose shape has changed is a cache that has grown: it stays."""
        tensors = named_tensors(self._module)
        for name, original in self._kept.items():
            raw, current = tensors.get(name, (name, None))
            if current is None or current.shape != original.shape:
                continue
            if current.is_inference():  # made by a forward pass in inference mode: no in-place write
                parent, _, key = raw.rpartition(".")
                setattr(self._module.get_submodule(parent), key, original.to(current))
            else:
                current.copy_(original)
        if self._extra_state:
            self._module.load_state_dict(copy.deepcopy(self._extra_state), strict=False)

    def load(self, weights: Mapping[str, Tensor], name: str, frozen: str | None = None, partial: bool = False) -> None:
        """Restore the module and load a state dict. Either may come from a compiled or wrapped module.

        The module keeps its own extra state.

        Args:
            weights: a state dict.
            name: the name of the checkpoint in errors.
            frozen: :func:`frozen_digest` of the parameters that the state dict leaves out, if it is known.
            partial: whether the state dict may leave out parameters.

        Raises:
            ValueError: if the weights do not fit the module, or it has other frozen parameters.
        """
        module, tensors = self._module, named_tensors(self._module)
        targets: dict[str, Any] = module.state_dict() | dict(tensors.values())
        own = {canonical_name(raw): raw for raw in targets}
        given = {own.get(canonical_name(raw), raw): tensor for raw, tensor in weights.items()}
        self.restore()
        if not self._complete:
            # The module's load_state_dict may use entries with names of their own for any tensor.
            self._keep(tensors if given.keys() - dict(tensors.values()).keys() else given)
        problems = [_misfit(raw, tensor, targets.get(raw)) for raw, tensor in given.items()]
        if len(given) < len(weights):
            problems.append("some of its names differ only in what wrappers add")
        refusals, unexpected = self._load(given, targets, whole=not partial)
        problems += refusals
        found = {id(tensor) for raw, tensor in tensors.values() if raw in given}
        empty = [name for name in self._without_content if name in tensors and id(tensors[name][1]) not in found]
        if empty:
            problems.append(
                f"Missing keys of tensors that are on the meta device, without content: {listed(empty, _NAMED)}"
            )
        lines = [problem for problem in problems if problem]
        if lines:
            raise ValueError(
                f"{name} does not fit {type(module).__name__}: names, shapes or dtypes differ\n  " + "\n  ".join(lines)
            )
        if frozen is not None and frozen_digest(module, weights) != frozen:
            raise ValueError(
                f"{name} holds only the parameters that were trained, and this {type(module).__name__} has other frozen"
                " parameters than the model had in training: pass the model that was trained, or the same base model"
                " in the same dtype with the same adapters"
            )
        if unexpected:
            _told.warn(f"{name} has entries that {type(module).__name__} does not use: {listed(unexpected, _NAMED)}")

    def _load(
        self, given: Mapping[str, Tensor], targets: Mapping[str, Any], whole: bool
    ) -> tuple[list[str], list[str]]:
        """Call the module's ``load_state_dict``.

        Args:
            given: the state dict, under the names of the module.
            targets: the module's own tensors and extra state, by name.
            whole: whether the state dict must have all parameters.

        Returns:
            What does not fit, and the names that the module does not use.
        """
        parts = {raw: _part(tensor, targets.get(raw)) for raw, tensor in given.items()}
        problems: list[str] = []
        unexpected: list[str] = []
        try:
            if self._overridden:
                extra = {raw: value for raw, value in targets.items() if is_extra_state(raw)}
                self._module.load_state_dict(extra | parts, strict=self._strict)
            else:
                missing, unexpected = self._module.load_state_dict(parts, strict=False)
                missing = [raw for raw in missing if not is_extra_state(raw)]
                if self._strict and missing and whole:
                    problems.append(f"Missing keys: {listed(missing, _NAMED)}")
                if unexpected and (self._strict or len(unexpected) == len(given)):
                    problems.append(f"Unexpected keys: {listed(unexpected, _NAMED)}")
        except RuntimeError as error:
            reasons = [line.strip() for line in str(error).splitlines()]
            problems += reasons[1:] if reasons[0].startswith("Error(s) in loading") else reasons
        return problems, unexpected

    def _keep(self, names: Iterable[str]) -> None:
        tensors = named_tensors(self._module)
        for name in map(canonical_name, names):
            _, tensor = tensors.get(name, (name, None))
            if tensor is not None and not tensor.is_meta and name not in self._kept:
                original = tensor.detach()
                # This rank's part of a sharded tensor is small, so it stays on the device.
                self._kept[name] = original.clone() if is_sharded(original) else original.to("cpu", copy=True)


def load_each(module: nn.Module, checkpoints: Sequence[Checkpoint]) -> Iterator[Checkpoint]:
    """Load one checkpoint after another, and yield each when the module has its weights and is in eval mode.

    Args:
        module: a copy of the user's module that has not been changed yet.
        checkpoints: the checkpoints.

    Raises:
        ValueError: if the weights do not fit the module, or it has other frozen parameters.
    """
    original = Original(module, partial=any(checkpoint.partial for checkpoint in checkpoints))
    for checkpoint in checkpoints:
        original.load(checkpoint.load(), checkpoint.name, checkpoint.frozen, checkpoint.partial)
        enter_eval(module)
        yield checkpoint


def enter_eval(module: nn.Module) -> None:
    """Set a module to eval mode after it got weights.

    In eval mode, some modules keep what they made of their weights, as LeViT keeps its biases of attention. They let go
    of it in train mode.
    """
    module.train()
    module.eval()


def _plain_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The plain, dense parameters and buffers that have memory."""
    return [
        (name, tensor)
        for name, (_, tensor) in named_tensors(module).items()
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.data_ptr()
    ]


def _scripted(module: nn.Module) -> list[str]:
    """The modules of ``torch.jit`` with weights. If they are frozen, these are constants, and no parameters."""
    return [
        prefix or "the model itself"
        for prefix, part in module.named_modules()
        if isinstance(part, ScriptModule) and (any(True for _ in part.parameters()) or not hasattr(part, "training"))
    ]


def _transient(module: nn.Module) -> list[str]:
    """The names of the buffers that are not persistent."""
    return [
        f"{prefix}.{key}" if prefix else key
        for prefix, part in module.named_modules(remove_duplicate=False)
        for key in transient_buffers(part)
    ]


def _part(tensor: Tensor, like: Any) -> Tensor:
    return shard_like(tensor, like) if isinstance(like, Tensor) and like.shape == tensor.shape else tensor


def _misfit(name: str, tensor: Tensor, like: Any) -> str | None:
    """What torch would load only in part, without an error; None if there is no such mistake."""
    if not isinstance(like, Tensor) or is_lazy(like):
        return None
    if tensor.is_complex() and not like.is_complex():
        return f"{name} is complex in the checkpoint, but real in the model"
    if like.is_floating_point() and not (tensor.is_floating_point() or tensor.is_complex()):
        return f"{name} has integers ({tensor.dtype}) in the checkpoint, as quantized weights do, but not in the model"
    if not like.ndim and tensor.ndim == 1 and len(tensor) != 1:
        return f"size mismatch for {name}: it has {len(tensor)} numbers, but the model has a single number"
    return None
