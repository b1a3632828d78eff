"""Fully connected layers."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers import Layer


class _Affine(Layer):
    @staticmethod
    @abstractmethod
    def sides(activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to the rows of the weight, and what to its columns."""

    @classmethod
    def weight(cls, module: nn.Module, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG003
        """Shape ``(size, rows, columns)``."""
        return _product(*cls.sides(activation, gradient), size)

    @classmethod
    def project_weight(
        cls,
        module: nn.Module,  # noqa: ARG003
        activation: Tensor,
        gradient: Tensor,
        size: int,
        left: Tensor,
        right: Tensor,
    ) -> Tensor:
        """Shape ``(size, l, r)``: each side projected, then multiplied."""
        rows, columns = cls.sides(activation, gradient)
        return _product(rows @ left, columns @ right, size)

    @staticmethod
    def bias(module: nn.Module, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG004
        """Sum over positions."""
        return gradient.reshape(size, -1, gradient.shape[-1]).sum(1)


def _product(left: Tensor, right: Tensor, size: int) -> Tensor:
    """Per example, the sum over positions of outer products."""
    left, right = (part.reshape(size, -1, part.shape[-1]) for part in (left, right))
    return torch.bmm(left.transpose(1, 2), right)


class LinearLayer(_Affine, covers=[nn.Linear]):
    """``nn.Linear`` on inputs of any rank."""

    @staticmethod
    def sides(activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """A row for each output."""
        return gradient, activation


class TransposedLinearLayer(_Affine, covers=["transformers.pytorch_utils.Conv1D"]):
    """GPT-2's linear layer in Hugging Face Transformers, whose weight lies the other way round."""

    @staticmethod
    def sides(activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """A row for each input."""
        return activation, gradient
