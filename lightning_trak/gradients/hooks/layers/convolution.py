"""Convolutions and transposed convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.compatibility import explicit_padding
from lightning_trak.gradients.hooks.layers.base import Layer, LayerCall
from lightning_trak.gradients.hooks.parts import examples_at_once

_TYPES = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
_CPU_BYTES = 1 << 22  # of patches that are copied at a time, so that they stay in cache
_FEW_CHANNELS = 8  # with fewer, a convolution does not fill the vectors of a CPU
_MANY_CHANNELS = 64  # of the output: with these, products take much longer than copies of patches
_SAME = ["transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d"]  # nn.Conv2d's forward


class ConvolutionLayer(Layer, covers=[*_TYPES, *_SAME]):
    """Convolutions with any stride, padding, dilation and number of groups."""

    module: Any  # one of six types without a common public base class

    def gradient(self, parameter: str, call: LayerCall) -> Tensor:
        """Shape ``(size, *weight.shape)`` for the weight; for the bias, a sum over positions."""
        if parameter == "bias":
            return self._images(call.output_gradient, call.size).flatten(3).sum((1, 3))
        if call.inputs.device.type == "cpu" and self.has_factors() and self._suits_products(call):
            return self._products(call)
        return self._kernels(call, self.module.weight.shape)

    def _suits_products(self, call: LayerCall) -> bool:
        """Whether products with patches take less time on a CPU than a convolution.

        Products need copies of the patches. These cost little if the output has many channels, since each copy is
        multiplied with all of them, or fewer positions than channels, since the gradients are then larger than the
        copies. Kernels of one element need no copies. If the input has few channels, convolutions are slow.
        """
        weight = self.module.weight
        positions = call.output_gradient[:, 0].numel() // call.size
        many = len(weight) >= _MANY_CHANNELS or len(weight) > positions
        return many or weight.shape[1] < _FEW_CHANNELS or weight[0, 0].numel() == 1

    def _products(self, call: LayerCall) -> Tensor:
        """The weight's gradients as products of :meth:`factors`, with the patches of a few examples at a time.

        In memory, their channels are last.
        """
        weight = self.module.weight
        # Before the patches, which would else take a part of the memory of the last kernels, which is in cache.
        kernels = call.output_gradient.new_empty(call.size, len(weight), *weight.shape[2:], weight.shape[1])
        output_gradients = self._by_position(call.output_gradient, call.size)
        patches = self._patches(call.inputs, self._has_long_runs)
        step = examples_at_once(_CPU_BYTES * call.size, weight[0].numel() * call.output_gradient[:, 0].nbytes)
        images = len(patches) // call.size  # of an example
        for start in range(0, call.size, step):
            stop = min(start + step, call.size)
            inputs = self._ordered(patches[start * images : stop * images], stop - start)
            torch.bmm(output_gradients[start:stop].mT, inputs, out=kernels[start:stop].flatten(2))
        return kernels.movedim(-1, 2)

    def has_rows(self, parameter: str) -> bool:
        """On accelerators true for the weight, if it has :meth:`factors`: its rows are the channels of the output.

        On a CPU, all rows together need the patches only once.
        """
        return parameter == "weight" and self.has_factors() and self.module.weight.device.type != "cpu"

    def gradient_rows(self, parameter: str, call: LayerCall, rows: range) -> Tensor:
        """Shape ``(size, len(rows), *weight.shape[1:])``. The rows are the kernels of some output channels."""
        shape = self.module.weight.shape
        some = call.output_gradient.narrow(1 - len(shape), rows.start, len(rows))
        return self._kernels(replace(call, output_gradient=some), torch.Size([len(rows), *shape[1:]]))

    def _kernels(self, call: LayerCall, shape: torch.Size) -> Tensor:
        """The gradients of the kernels that give the channels of ``call.output_gradient``: ``(size, *shape)``."""
        module, size = self.module, call.size
        inputs, padding = self._padded(call.inputs)
        # One convolution of all examples, each with channels and groups of its own. On a CPU, one for each example
        # takes longer, and small kernels cannot use several threads.
        image, output_gradient = (
            self._images(part, size).transpose(0, 1).flatten(1, 2) for part in (inputs, call.output_gradient)
        )
        weight = output_gradient.new_empty(size * shape[0], *shape[1:])  # its values are not used
        kernels: Tensor = torch.ops.aten.convolution_backward(
            output_gradient, image, weight, None, module.stride, padding, module.dilation, module.transposed,
            module.output_padding, size * module.groups, [False, True, False],
        )[1]  # fmt: skip
        return kernels.view(size, *shape)

    def projected_gradient(self, parameter: str, call: LayerCall, left: Tensor, right: Tensor) -> Tensor | None:
        """Shape ``(size, l, r)``. The product of all patches with ``right`` is a convolution; its columns are kernels.

        For a transposed convolution, input and output are exchanged, as the rows and columns of its weight are. With
        groups, weights are small, and this returns None.
        """
        if parameter != "weight" or self.module.groups > 1:
            return None
        inputs, padding = self._padded(call.inputs)
        gradient = call.output_gradient
        patched, pointwise = (gradient, inputs) if self.module.transposed else (inputs, gradient)
        columns = self._convolved(patched, right.T, padding)
        rows = _product(left.T, pointwise)
        rows, columns = (self._images(part, call.size).flatten(3) for part in (rows, columns))
        return torch.einsum("bilp,birp->blr", rows, columns)

    def has_factors(self) -> bool:
        """True without groups, which have many matrices, and if not transposed, which has patches of the output."""
        return self.module.groups == 1 and not self.module.transposed

    def factors(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The output's gradients and, as inputs, the patches that the kernel is applied to; by position."""
        patches = self._patches(call.inputs).flatten(1, self.module.weight.ndim - 1)
        return self._by_position(call.output_gradient, call.size), self._by_position(patches, call.size)

    def ordered_factors(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The same, with the channels of a patch last."""
        patches = self._ordered(self._patches(call.inputs, self._has_long_runs), call.size)
        return self._by_position(call.output_gradient, call.size), patches

    def _by_position(self, images: Tensor, size: int) -> Tensor:
        """Shape ``(size, positions of an example, channels)``."""
        return self._images(images, size).flatten(3).transpose(2, 3).flatten(1, 2)

    @property
    def _has_long_runs(self) -> bool:
        """Whether longer runs of numbers can be copied from patches if the channels are last in memory."""
        weight: Tensor = self.module.weight
        return weight.shape[1] >= _FEW_CHANNELS and weight[0, 0].numel() > 1

    def _ordered(self, patches: Tensor, size: int) -> Tensor:
        """Patches by position, with their channels last: shape ``(size, positions of an example, inputs)``."""
        dims = self.module.weight.ndim - 2
        if self._has_long_runs:
            order = 0, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims), 1
            return patches.permute(order).reshape(size, -1, self.module.weight[0].numel())
        return self._by_position(patches.movedim(1, 1 + dims).flatten(1, 1 + dims), size)

    def _patches(self, inputs: Tensor, channels_last: bool = False) -> Tensor:
        """The patches that the kernel is applied to: a view of shape ``(images, *weight.shape[1:], *positions)``.

        Args:
            inputs: the layer's input.
            channels_last: the order of the input's memory, and so the order in which patches are copied fastest.
        """
        module, (patches, padding) = self.module, self._padded(inputs)
        dims, first = len(padding), 1 if channels_last else 2
        if channels_last:
            patches = patches.movedim(1, -1)
        if module.weight[0, 0].numel() > 1:  # so that copies of patches read consecutive numbers
            patches = patches.contiguous()
        if any(padding):
            patches = F.pad(patches, [0, 0] * channels_last + [zeros for zeros in reversed(padding) for _ in range(2)])
        for dim, length, stride, dilation in zip(
            range(first, first + dims), module.kernel_size, module.stride, module.dilation, strict=True
        ):
            patches = patches.unfold(dim, dilation * (length - 1) + 1, stride)[..., ::dilation]
        if channels_last:
            patches = patches.movedim(1 + dims, 1)
        return patches.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))

    def _convolved(self, images: Tensor, kernels: Tensor, padding: list[int]) -> Tensor:
        """The module's convolution with other kernels. Each row of the matrix ``kernels`` is one kernel."""
        module = self.module
        convolved: Tensor = torch.ops.aten.convolution(
            images, kernels.reshape(-1, *module.weight.shape[1:]), None, module.stride, padding, module.dilation,
            False, [0] * len(padding), 1,
        )  # fmt: skip
        return convolved

    def _images(self, images: Tensor, size: int) -> Tensor:
        """Shape ``(size, images of an example, channels, *positions)``."""
        return images.reshape(size, -1, *images.shape[1 - self.module.weight.ndim :])

    def _padded(self, inputs: Tensor) -> tuple[Tensor, list[int]]:
        """The inputs with all other padding, and the number of zeros that the convolution adds on both sides."""
        module = self.module
        if isinstance(module.padding, tuple) and module.padding_mode == "zeros":
            return inputs, list(module.padding)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(inputs, explicit_padding(module), mode=mode), [0] * len(module.kernel_size)


def _product(matrix: Tensor, images: Tensor) -> Tensor:
    """The product with the channels of each image. As a convolution it takes any order in memory without copies."""
    dims = images.ndim - 2
    kernels = matrix.reshape(*matrix.shape, *[1] * dims)
    ones, zeros = [1] * dims, [0] * dims
    product: Tensor = torch.ops.aten.convolution(images, kernels, None, ones, zeros, ones, False, zeros, 1)
    return product
