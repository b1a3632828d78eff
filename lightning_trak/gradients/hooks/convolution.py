"""Convolutions, transposed ones included."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.compatibility import explicit_padding
from lightning_trak.gradients.hooks.layers import Layer

_TYPES = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


class ConvolutionLayer(Layer, covers=[*_TYPES]):
    """Any stride, padding, dilation and number of groups."""

    @staticmethod
    def weight(module: Any, activation: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Shape ``(size, *weight.shape)``."""
        activation, padding = _padded(module, activation)
        weight = module.weight.to(gradient.dtype)

        def one(part: Tensor, slope: Tensor) -> Tensor:
            gradients = torch.ops.aten.convolution_backward(
                slope, part, weight, None, module.stride, padding, module.dilation, module.transposed,
                module.output_padding, module.groups, [False, True, False],
            )  # fmt: skip
            kernel: Tensor = gradients[1]
            return kernel

        parts, slopes = _images(activation, weight, size), _images(gradient, weight, size)
        if activation.device.type != "cpu":
            return torch.vmap(one)(parts, slopes)
        # A kernel call for each example beats unfolding and multiplying, and the grouped convolution that vmap makes
        # of it, on most layers of a ResNet-9.
        each = [one(part, slope) for part, slope in zip(parts, slopes, strict=True)]
        return torch.stack(each) if size > 1 else each[0].unsqueeze(0)

    @staticmethod
    def project_weight(
        module: Any, activation: Tensor, gradient: Tensor, size: int, left: Tensor, right: Tensor
    ) -> Tensor | None:
        """Shape ``(size, l, r)``: multiplying every patch by ``right`` is a convolution with its columns as kernels.

        A transposed convolution is the same with input and output exchanged, as the rows of its weight are. Not for
        groups, whose weights are small.
        """
        if module.groups > 1:
            return None
        activation, padding = _padded(module, activation)
        patched, pointwise = (gradient, activation) if module.transposed else (activation, gradient)
        kernels = right.T.reshape(-1, *module.weight.shape[1:])
        patches = torch.ops.aten.convolution(
            patched, kernels, None, module.stride, padding, module.dilation, False, [0] * len(padding), 1
        )
        columns = _images(patches, module.weight, size).flatten(3)
        rows = torch.matmul(left.T, _images(pointwise, module.weight, size).flatten(3))
        return torch.einsum("bilp,birp->blr", rows, columns)

    @staticmethod
    def factored(module: Any) -> bool:
        """Not for groups, whose weight is many matrices, nor transposed ones, where patches are of the output."""
        return module.groups == 1 and not module.transposed

    @staticmethod
    def sides(module: Any, activation: Tensor, gradient: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """A row for each output channel; the columns are the patches that the kernel is laid on."""
        activation, padding = _padded(module, activation)
        columns = module.weight[0].numel()
        # Patches by convolution with all unit kernels: any number of dimensions, strides and dilations.
        kernels = torch.eye(columns, dtype=activation.dtype, device=activation.device)
        patches = torch.ops.aten.convolution(
            activation, kernels.view(-1, *module.weight.shape[1:]), None, module.stride, padding, module.dilation,
            False, [0] * len(padding), 1,
        )  # fmt: skip
        rows, columns = (
            _images(part, module.weight, size).flatten(3).transpose(2, 3).flatten(1, 2) for part in (gradient, patches)
        )
        return rows, columns

    @staticmethod
    def bias(module: Any, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG004
        """Sum over positions."""
        return _images(gradient, module.weight, size).flatten(3).sum((1, 3))


def _images(images: Tensor, weight: Tensor, size: int) -> Tensor:
    """Shape ``(size, images of an example, channels, *positions)``."""
    return images.reshape(size, -1, *images.shape[1 - weight.ndim :])


def _padded(module: Any, activation: Tensor) -> tuple[Tensor, list[int]]:
    """The activation and what the kernel is to pad it by: all padding that is not with as many zeros on both sides."""
    if isinstance(module.padding, tuple) and module.padding_mode == "zeros":
        return activation, list(module.padding)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(activation, explicit_padding(module), mode=mode), [0] * len(module.kernel_size)
