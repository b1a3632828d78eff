"""Weights of convolutions in the order that a CPU's kernels compute in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16)  # oneDNN computes in them
_LEAST = 1 << 16  # elements of all weights; in small models the order gains nothing


def reordered(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a model's convolutions that :func:`channels_last` is for: on a CPU, and of one group.

    There are none if these are few, or if a convolution has groups: its gradients by example then take longer.
    """
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    if any(part.groups > 1 for part in convolutions):
        return []
    # A convolution may have its weight under another name, or compute it.
    weights = dict.fromkeys(dict(part.named_parameters(recurse=False)).get("weight") for part in convolutions)
    plain = [weight for weight in weights if weight is not None and _is_plain(weight)]
    return plain if sum(weight.numel() for weight in plain) >= _LEAST else []


@contextmanager
def channels_last(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside this context, the weights have their channels last in memory; afterwards, they are as before.

    The outputs of their convolutions, and of most operations after them, then have this order, too. oneDNN computes in
    it, and need not reorder each input and output (its "Memory format propagation"). Numbers change by rounding.

    Code that depends on the order of a tensor in memory may raise an error (``Tensor.view``), or compute something else
    (``Tensor.as_strided``).
    """
    before = [(weight, weight.data) for weight in weights]
    try:
        for weight, data in before:
            weight.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in before:
            weight.data = data


def _is_plain(weight: nn.Parameter) -> bool:
    plain = type(weight.data) is torch.Tensor and weight.layout == torch.strided and weight.device.type == "cpu"
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(known and plain and weight.dtype in _DTYPES)
