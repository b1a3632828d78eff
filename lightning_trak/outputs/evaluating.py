"""How outputs are computed everywhere: in one way, and without leaving anything behind on the module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def exact_attention() -> Iterator[None]:
    """Switch the fused path of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` off.

    PyTorch takes it only where nothing is differentiated. It fills padded positions with zeros, so that one module
    would have one output with gradients and another one without.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def unchanged(*owners: object) -> Iterator[None]:
    """Put back what code sets on some objects and their modules while the context is open.

    A forward pass may keep something of its batch on the module, such as a mask. The next batch would find it there;
    under ``vmap`` it is not even a tensor that can be used later. Tensors that are changed in place are not put back.

    Args:
        owners: modules, or objects whose attributes may be modules.
    """
    objects = [part for owner in owners for part in _parts(owner)]
    attributes = [(vars(part), dict(vars(part))) for part in objects]
    containers = [value for _, saved in attributes for value in saved.values() if type(value) in _CONTAINERS]
    empty = [value for value in containers if not value]  # most are; they take no copy
    contents = [(value, type(value)(value)) for value in containers if value]
    try:
        yield
    finally:
        for value in empty:
            value.clear()
        for live, saved in [*attributes, *contents]:
            live.clear()
            (live.extend if isinstance(live, list) else live.update)(saved)


def modules_of(owner: object) -> list[nn.Module]:
    """The modules that an object has as attributes."""
    return [value for value in vars(owner).values() if isinstance(value, nn.Module)]


def modules_in_eval(owner: object, device: torch.device) -> None:
    """Move the modules that an object has as attributes to a device, and set them to eval mode."""
    for part in modules_of(owner):
        part.to(device).eval()


def _parts(owner: object) -> Iterable[object]:
    if isinstance(owner, nn.Module):
        return owner.modules()
    return [owner, *(part for module in modules_of(owner) for part in module.modules())]
