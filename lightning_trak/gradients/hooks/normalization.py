"""Normalisations: the gradient of the scale is that of the shift with the output's gradient times normalised input."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers import Layer


class _Normalization(Layer):
    @staticmethod
    @abstractmethod
    def normalized(module: Any, activation: Tensor) -> Tensor:
        """The input after normalisation, before scale and shift."""

    @staticmethod
    @abstractmethod
    def bias(module: Any, activation: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Shape ``(size, numel)``: the sum over everything that shares an element of the shift."""

    @classmethod
    def weight(cls, module: Any, activation: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Shape ``(size, numel)``."""
        return cls.bias(module, activation, gradient * cls.normalized(module, activation), size)


class _OverLastDimensions(_Normalization):
    @staticmethod
    def bias(module: Any, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG004
        """Shape ``(size, numel)``: an element of the shift belongs to one place in the last dimensions."""
        return gradient.reshape(size, -1, module.weight.numel()).sum(1)


class LayerNormLayer(_OverLastDimensions, covers=[nn.LayerNorm]):
    """``nn.LayerNorm``."""

    @staticmethod
    def normalized(module: Any, activation: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the last dimensions."""
        return F.layer_norm(activation, module.normalized_shape, eps=module.eps)


class RMSNormLayer(_OverLastDimensions, covers=[nn.RMSNorm]):
    """``nn.RMSNorm``."""

    @staticmethod
    def normalized(module: Any, activation: Tensor) -> Tensor:
        """Mean square 1 over the last dimensions."""
        return F.rms_norm(activation, module.normalized_shape, eps=module.eps)


class _OfChannels(_Normalization):
    @staticmethod
    def bias(module: Any, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG004
        """Shape ``(size, channels)``: an element of the shift belongs to a channel, dimension 1."""
        return gradient.reshape(size, -1, module.weight.numel(), gradient[0, 0].numel()).sum((1, 3))


class GroupNormLayer(_OfChannels, covers=[nn.GroupNorm]):
    """``nn.GroupNorm``."""

    @staticmethod
    def normalized(module: Any, activation: Tensor) -> Tensor:
        """Mean 0 and variance 1 in each group of channels."""
        return F.group_norm(activation, module.num_groups, eps=module.eps)


class BatchNormLayer(_OfChannels, covers=[nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]):
    """Batch normalisation with running statistics, as in eval mode."""

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """With the batch's own statistics, an example has no gradient of its own."""
        if module.training:
            return "in training mode it mixes the examples of a batch: call module.eval()"
        if module.running_mean is None:
            return "without running statistics it mixes the examples of a batch"
        return None

    @staticmethod
    def normalized(module: Any, activation: Tensor) -> Tensor:
        """The input relative to the running statistics."""
        return F.batch_norm(activation, module.running_mean, module.running_var, eps=module.eps)
