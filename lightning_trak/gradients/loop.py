"""Per-example gradients one example at a time: slow, and right for any model that autograd can differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_trak.gradients.base import GradientEngine, differentiating, in_real_numbers, real_shape
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.leaves import apart_from, require_own_leaves
from lightning_trak.outputs.evaluating import modules_of


class _RowMajor(torch.autograd.Function):
    """The identity, in place, whose gradient is laid out row by row."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        return gradient.clone(memory_format=torch.contiguous_format)


class _RightBatchNorm(TorchFunctionMode):
    """Makes the gradient of batch normalisation right for a single example.

    In eval mode on a CPU, torch (2.13) takes a gradient in channels-last order for one in row-major order if the batch
    holds one example, since the strides of its first dimension do not tell.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func in (F.batch_norm, torch.batch_norm):
            return _RowMajor.apply(result)  # type: ignore[no-untyped-call]
        return result


class LoopEngine(GradientEngine):
    """One backward pass per example, through ``torch.autograd.grad`` (``.grad`` is never written)."""

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """One example after the other. Those that depend on no selected parameter have gradients of zero."""
        found = [self.one(batch, number) for number in range(batch.size)]
        return torch.cat([value for value, _ in found]), {
            name: torch.cat([rows[name] for _, rows in found]) for name in self.parameters
        }

    def alone(self, batch: ExampleBatch, number: int) -> Tensor:
        """The output of one example of a batch, taken out of it; shape ``(1,)``.

        Raises:
            ValueError: if the model takes the batch, and not the example.
        """
        try:
            return self.outputs(batch.take([number]))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if not self._takes(batch):
                raise  # the model is at fault: let it say so
            raise ValueError(
                f"{type(self.module).__name__} takes a batch of {batch.size} examples and fails on one of them alone,"
                f" as if parts of the batch belonged to all of it: {type(error).__name__}: {error}. Make the collate_fn"
                " give every part a row for each example, or use batch_size=1"
            ) from error

    def _takes(self, batch: ExampleBatch) -> bool:
        if batch.size < 2:
            return False
        try:
            with torch.no_grad():
                self.outputs(batch)
        except Exception:  # which one does not matter: that of the example will be told
            return False
        return True

    def one(
        self, batch: ExampleBatch, number: int, original: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One example of a batch, alone.

        Args:
            batch: the examples.
            number: which.
            original: the user's module; given, the output is checked to depend on nothing of it, and on no other
                tensors that require gradients than the copy's parameters.

        Returns:
            As for a batch of one.

        Raises:
            ValueError: if the output is not one number, or depends on foreign tensors.
        """
        parameters = list(self.parameters.values())
        with differentiating(self.module, parameters), torch.enable_grad():
            with apart_from(original, self.module), _RightBatchNorm():
                value = self.alone(batch, number)
            self._require_one_each(value, 1)
            if original is not None:
                require_own_leaves(value, self.module, *modules_of(self.output))
            if not value.requires_grad:
                nothing = (real_shape(parameter).numel() for parameter in parameters)
                return value, {n: value.new_zeros(1, size) for n, size in zip(self.parameters, nothing, strict=True)}
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        rows = (in_real_numbers(gradient).reshape(1, -1) for gradient in gradients)
        return value.detach(), dict(zip(self.parameters, rows, strict=True))
