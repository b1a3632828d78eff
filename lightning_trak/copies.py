"""Copies of the user's module, on which all work is done, and weights for them."""

import copy
from collections.abc import Mapping

import lightning as L
from torch import Tensor, nn

from lightning_trak.gradients import canonical_name


def uncompiled(model: nn.Module) -> nn.Module:
    """What `torch.compile` was given, if it made this model: copies cannot share its code."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def copy_module(module: nn.Module) -> nn.Module:
    """A copy of the module, to work on.

    Raises:
        ValueError: if it cannot be copied.
    """
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(
            f"attribution works on a copy of the model, but {type(module).__name__} cannot be copied: {error}; keep"
            " tensors with gradients, locks and open files out of its attributes"
        ) from error
    for part in copied.modules():
        # LightningModule keeps what compile() made of it, which would run the original.
        part._compiled_call_impl = None
    for parameter in copied.parameters():
        parameter.grad = None
    if isinstance(copied, L.LightningModule):
        copied.configure_model()
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
    own = {canonical_name(raw): raw for raw in module.state_dict()}
    renamed = {own.get(canonical_name(raw), raw): tensor for raw, tensor in weights.items()}
    try:
        module.load_state_dict(renamed, strict=getattr(module, "strict_loading", True))
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit {type(module).__name__}: {error}") from error
