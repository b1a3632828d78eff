"""Normalisations: the gradient of the scale is that of the shift with the output's gradient times normalised input."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.compatibility import replaced_parameter
from lightning_trak.gradients.base import EngineError
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


class ScaleLayer(Layer, covers_by_structure=True):
    """A module of one's own whose output is affine in its only weight, a vector along the last dimension.

    Such are the RMS normalisations of Llama, Qwen, Gemma, T5 and others: some multiply by ``weight``, some by
    ``1 + weight``. What multiplies the weight is the difference of two outputs, with weights of one and of zero. That
    the output is affine in the weight is checked with other weights, each time.
    """

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """One vector as ``weight``, nothing below it, and a forward of one argument."""
        parameters = dict(module.named_parameters(recurse=False))
        if list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or any(True for _ in module.children()):
            return False
        arguments = list(inspect.signature(module.forward).parameters.values())
        return len(arguments) == 1 and arguments[0].kind in (
            arguments[0].POSITIONAL_OR_KEYWORD,
            arguments[0].POSITIONAL_ONLY,
        )

    @classmethod
    def weight(cls, module: Any, activation: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Shape ``(size, numel)``.

        Raises:
            EngineError: if the output is not affine in the weight.
        """
        weight = module.weight.detach()
        other = torch.linspace(0.5, 1.5, len(weight), dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            nothing, slope, found = (
                _with_weight(module, value, activation)
                for value in (torch.zeros_like(weight), torch.ones_like(weight), other)
            )
            if slope.shape != gradient.shape or slope.shape[-1:] != weight.shape:
                raise EngineError(f"{type(module).__name__} does not scale its last dimension by its weight")
            slope = slope - nothing
            error = (found - nothing - other * slope).abs().max()
        if error > 1e-2 * slope.abs().max():
            raise EngineError(f"{type(module).__name__} is not affine in its weight")
        return (gradient * slope).reshape(size, -1, weight.numel()).sum(1)


def _with_weight(module: Any, weight: Tensor, activation: Tensor) -> Tensor:
    """The output for another weight, without the hooks on the module."""
    with replaced_parameter(module, "weight", weight):
        output: Tensor = module.forward(activation)
    return output
