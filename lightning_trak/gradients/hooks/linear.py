"""Fully connected layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers import Layer


def _product(left: Tensor, right: Tensor, size: int) -> Tensor:
    """Per example, the sum over positions of outer products."""
    left, right = (part.reshape(size, -1, part.shape[-1]) for part in (left, right))
    return torch.bmm(left.transpose(1, 2), right)


class _Affine(Layer):
    @staticmethod
    def bias(module: nn.Module, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG004
        """Sum over positions."""
        return gradient.reshape(size, -1, gradient.shape[-1]).sum(1)


class LinearLayer(_Affine, covers=[nn.Linear]):
    """``nn.Linear`` on inputs of any rank."""

    @staticmethod
    def weight(module: nn.Module, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG004
        """Shape ``(size, outputs, inputs)``."""
        return _product(gradient, activation, size)

    @staticmethod
    def project_weight(
        module: nn.Module,  # noqa: ARG004
        activation: Tensor,
        gradient: Tensor,
        size: int,
        left: Tensor,
        right: Tensor,
    ) -> Tensor:
        """Shape ``(size, l, r)``: each side projected, then multiplied."""
        return _product(gradient @ left, activation @ right, size)


class TransposedLinearLayer(_Affine, covers=["transformers.pytorch_utils.Conv1D"]):
    """GPT-2's linear layer in Hugging Face Transformers, whose weight lies the other way round."""

    @staticmethod
    def weight(module: nn.Module, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG004
        """Shape ``(size, inputs, outputs)``."""
        return _product(activation, gradient, size)

    @staticmethod
    def project_weight(
        module: nn.Module,  # noqa: ARG004
        activation: Tensor,
        gradient: Tensor,
        size: int,
        left: Tensor,
        right: Tensor,
    ) -> Tensor:
        """Shape ``(size, l, r)``: the rows of this weight belong to its inputs."""
        return _product(activation @ left, gradient @ right, size)
