"""Fully connected layers."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers import Layer


class _Affine(Layer):
    @staticmethod
    def factored(module: nn.Module) -> bool:  # noqa: ARG004
        """Always."""
        return True

    @staticmethod
    @abstractmethod
    def sides(module: nn.Module, activation: Tensor, gradient: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """See :class:`~lightning_trak.gradients.hooks.layers.Layer`."""

    @classmethod
    def weight(cls, module: nn.Module, activation: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Shape ``(size, rows, columns)``."""
        rows, columns = cls.sides(module, activation, gradient, size)
        return rows.transpose(1, 2) @ columns

    @classmethod
    def rows_of_weight(
        cls, module: nn.Module, activation: Tensor, gradient: Tensor, size: int, start: int, stop: int
    ) -> Tensor:
        """Shape ``(size, stop - start, columns)``."""
        rows, columns = cls.sides(module, activation, gradient, size)
        return rows[:, :, start:stop].transpose(1, 2) @ columns

    @classmethod
    def project_weight(
        cls,
        module: nn.Module,
        activation: Tensor,
        gradient: Tensor,
        size: int,
        left: Tensor,
        right: Tensor,
    ) -> Tensor:
        """Shape ``(size, l, r)``: each side projected, then multiplied."""
        rows, columns = cls.sides(module, activation, gradient, size)
        return (rows @ left).transpose(1, 2) @ (columns @ right)

    @staticmethod
    def bias(module: nn.Module, activation: Tensor, gradient: Tensor, size: int) -> Tensor:  # noqa: ARG004
        """Sum over positions."""
        return _positions(gradient, size).sum(1)


def _positions(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, -1, tensor.shape[-1])


class LinearLayer(_Affine, covers=[nn.Linear]):
    """``nn.Linear`` on inputs of any rank."""

    @staticmethod
    def sides(
        module: nn.Module,  # noqa: ARG004
        activation: Tensor,
        gradient: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        """A row for each output."""
        return _positions(gradient, size), _positions(activation, size)


class TransposedLinearLayer(_Affine, covers=["transformers.pytorch_utils.Conv1D"]):
    """GPT-2's linear layer in Hugging Face Transformers, whose weight lies the other way round."""

    rows_are_inputs = True

    @staticmethod
    def sides(
        module: nn.Module,  # noqa: ARG004
        activation: Tensor,
        gradient: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        """A row for each input."""
        return _positions(activation, size), _positions(gradient, size)
