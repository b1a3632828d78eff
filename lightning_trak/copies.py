"""Copies of the user's module, on which all work is done, and weights for them."""

import copy
from collections.abc import Mapping

import lightning as L
from torch import Tensor, nn

from lightning_trak.gradients import canonical_name
from lightning_trak.gradients.sharding import is_sharded, shard_like


def uncompiled(model: nn.Module) -> nn.Module:
    """What `torch.compile` was given, if it made this model: copies cannot share its code."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def copy_module(module: nn.Module, configure: bool = True) -> nn.Module:
    """A copy of the module, to work on.

    Args:
        module: the user's module.
        configure: call its ``configure_model()``, if it is a LightningModule.

    Raises:
        ValueError: if it cannot be copied, or configured without a device mesh.
    """
    name = type(module).__name__
    if any(is_sharded(parameter) for parameter in module.parameters()):
        raise ValueError(
            f"this {name} has been sharded, by training perhaps, and cannot be copied: pass a new one instead, whose"
            " configure_model() has not been called; the weights come from the checkpoints"
        )
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(
            f"attribution works on a copy of the model, but {name} cannot be copied: {error}; keep"
            " tensors with gradients, locks and open files out of its attributes"
        ) from error
    for part in copied.modules():
        # LightningModule keeps what compile() made of it, which would run the original.
        part._compiled_call_impl = None
    for parameter in copied.parameters():
        parameter.grad = None
    if configure and isinstance(copied, L.LightningModule):
        copied._device_mesh = None
        try:
            copied.configure_model()
        except TypeError as error:
            if "'NoneType' object is not subscriptable" not in str(error):
                raise
            raise ValueError(
                f"{name}.configure_model() fails without a device mesh: {error}; have it return if self.device_mesh is"
                " None, or use a Trainer with ModelParallelStrategy"
            ) from error
    return copied


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict, whether it or the module has been compiled or wrapped.

    Args:
        module: a copy of the user's module.
        weights: a state dict.
        name: what to call it in errors.

    Raises:
        ValueError: if the weights do not fit the module.
    """
    targets = module.state_dict()
    own = {canonical_name(raw): raw for raw in targets}
    renamed = {own.get(canonical_name(raw), raw): tensor for raw, tensor in weights.items()}
    renamed = {
        raw: shard_like(tensor, like)
        if (like := targets.get(raw)) is not None and like.shape == tensor.shape
        else tensor
        for raw, tensor in renamed.items()
    }
    try:
        module.load_state_dict(renamed, strict=getattr(module, "strict_loading", True))
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit {type(module).__name__}: {error}") from error
