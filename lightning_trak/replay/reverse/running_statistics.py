"""Running statistics of batch normalization as a part of the graph.

torch updates them in place and outside of autograd, and does not differentiate by them in eval mode. But they depend on
the weights of earlier steps, and the trained model's output depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_trak.compatibility import BatchNorm
from lightning_trak.replay.recording.states import named_buffers


class RunningStatistics:
    """The running statistics of a module's batch normalization layers.

    Args:
        module: a copy of the user's module.

    Attributes:
        layers: batch normalization layers with running statistics, by the canonical names of these two buffers.

    Raises:
        ValueError: if a layer averages over all batches (``momentum=None``), which is not supported.
    """

    def __init__(self, module: nn.Module) -> None:
        buffers = named_buffers(module)
        names = {id(buffer): name for name, buffer in buffers.items()}
        self.layers: dict[tuple[str, str], BatchNorm] = {}
        for part in module.modules():
            if isinstance(part, BatchNorm) and part.running_mean is not None and part.running_var is not None:
                if part.momentum is None:
                    raise ValueError(
                        f"a {type(part).__name__} has momentum=None, so that its statistics are averages over all"
                        " batches; their derivatives are not supported: use a number"
                    )
                self.layers[names[id(part.running_mean)], names[id(part.running_var)]] = part
        self.names = {name for pair in self.layers for name in pair}
        self._module = module

    def leaves(self) -> dict[str, Tensor]:
        """Copies of the statistics, for :meth:`tracked`."""
        buffers = named_buffers(self._module)
        return {name: buffers[name].detach().clone().requires_grad_() for name in sorted(self.names)}

    @contextmanager
    def tracked(self, before: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Let forward passes depend on given statistics, and compute the next ones with their graph.

        Args:
            before: the statistics, by name.

        Yields:
            The statistics after the forward passes so far, of those layers that have updated them.
        """
        after: dict[str, Tensor] = {}
        handles: list[RemovableHandle] = []
        for names, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(_updating(names, before, after)))
            handles.append(layer.register_forward_hook(_normalizing(names, before)))
        try:
            yield after
        finally:
            for handle in handles:
                handle.remove()


def _updating(
    names: tuple[str, str], before: Mapping[str, Tensor], after: dict[str, Tensor]
) -> Callable[[Any, Any], None]:
    """A hook that computes the next statistics of a layer in train mode."""

    def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
        if layer.training:
            inputs = args[0]
            dims = [dim for dim in range(inputs.ndim) if dim != 1]
            for name, batch in zip(names, (inputs.mean(dims), inputs.var(dims)), strict=True):
                current = after.get(name, before[name])
                after[name] = current + layer.momentum * (batch - current)

    return hook


def _normalizing(names: tuple[str, str], before: Mapping[str, Tensor]) -> Callable[[Any, Any, Any], Tensor | None]:
    """A hook that computes the output of a layer in eval mode from the given statistics."""

    def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if layer.training:
            return None
        shape = [1, -1] + [1] * (args[0].ndim - 2)
        mean, variance = (before[name].view(shape) for name in names)
        found = (args[0] - mean) * torch.rsqrt(variance + layer.eps)
        if layer.affine:
            found = found * layer.weight.view(shape) + layer.bias.view(shape)
        return found.to(output.dtype)

    return hook
