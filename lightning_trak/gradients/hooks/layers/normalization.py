"""Normalisations. The shift's gradient is a sum of the output's gradient; for the scale, times normalised input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers.base import Layer, LayerCall
from lightning_trak.gradients.hooks.parts import examples_at_once

_CPU_BYTES = 1 << 21  # of inputs that are normalised at a time, so that they stay in cache


class _Normalization(Layer):
    @abstractmethod
    def normalized(self, inputs: Tensor) -> Tensor:
        """The input after normalisation, before scale and shift, in memory of its own."""

    @abstractmethod
    def summed(self, tensor: Tensor, size: int) -> Tensor:
        """Shape ``(size, numel)``: for each element of the shift, the sum over all positions that use it."""

    def gradient(self, parameter: str, call: LayerCall) -> Tensor:
        """Shape ``(size, numel)``."""
        if parameter != "weight":
            return self.summed(call.output_gradient, call.size)
        on_cpu = call.inputs.device.type == "cpu"
        step = examples_at_once(_CPU_BYTES * call.size, call.inputs.nbytes) if on_cpu else call.size
        some = (call.take(start, min(start + step, call.size)) for start in range(0, call.size, step))
        parts = [self.summed(self.normalized(part.inputs).mul_(part.output_gradient), part.size) for part in some]
        return torch.cat(parts)


class _OverLastDimensions(_Normalization):
    module: nn.LayerNorm | nn.RMSNorm

    def summed(self, tensor: Tensor, size: int) -> Tensor:
        """An element of the shift belongs to one index of the last dimensions."""
        return tensor.reshape(size, -1, self.module.weight.numel()).sum(1)


class LayerNormLayer(_OverLastDimensions, covers=[nn.LayerNorm]):
    """``nn.LayerNorm``."""

    module: nn.LayerNorm

    def normalized(self, inputs: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the last dimensions."""
        return F.layer_norm(inputs, self.module.normalized_shape, eps=self.module.eps)


class RMSNormLayer(_OverLastDimensions, covers=[nn.RMSNorm]):
    """``nn.RMSNorm``."""

    module: nn.RMSNorm
    parameter_names = ("weight",)

    def normalized(self, inputs: Tensor) -> Tensor:
        """Mean square 1 over the last dimensions."""
        return F.rms_norm(inputs, self.module.normalized_shape, eps=self.module.eps)


class _OverChannels(_Normalization):
    module: nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

    def summed(self, tensor: Tensor, size: int) -> Tensor:
        """An element of the shift belongs to one channel (dimension 1)."""
        return tensor.reshape(size, -1, self.module.weight.numel(), tensor[0, 0].numel()).sum((1, 3))


class GroupNormLayer(_OverChannels, covers=[nn.GroupNorm]):
    """``nn.GroupNorm``."""

    module: nn.GroupNorm

    def normalized(self, inputs: Tensor) -> Tensor:
        """Mean 0 and variance 1 in each group of channels."""
        return F.group_norm(inputs, self.module.num_groups, eps=self.module.eps)


class BatchNormLayer(_OverChannels, covers=[nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]):
    """Batch normalisation with running statistics, as in eval mode."""

    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

    def refusal(self) -> str | None:
        """Refused if it uses the batch's own statistics: an example then has no gradient of its own."""
        if self.module.training:
            return "in training mode it mixes the examples of a batch: call module.eval()"
        if self.module.running_mean is None:
            return "without running statistics it mixes the examples of a batch"
        return None

    def normalized(self, inputs: Tensor) -> Tensor:
        """The input relative to the running statistics."""
        return F.batch_norm(inputs, self.module.running_mean, self.module.running_var, eps=self.module.eps)

    def input_gradient(self) -> Callable[[Tensor], Tensor]:
        """The gradient times the scale of each channel. Autograd would also sum over positions, for parameters."""
        weight, variance = self.module.weight, cast(Tensor, self.module.running_var)
        with torch.no_grad():
            scale = (variance.to(torch.promote_types(weight.dtype, torch.float32)) + self.module.eps).rsqrt() * weight

        def scaled(gradient: Tensor) -> Tensor:
            return (gradient * scale.view(-1, *[1] * (gradient.ndim - 2))).to(gradient.dtype)

        return scaled
