"""Per-example gradients, one example at a time. It is slow, and correct for every model that autograd supports."""

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
from lightning_trak.texts.messages import listed


class _RowMajor(torch.autograd.Function):
    """The identity, in place. The memory of its gradient is in row-major order."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        return gradient.clone(memory_format=torch.contiguous_format)


class _RightBatchNorm(TorchFunctionMode):
    """Corrects the gradient of batch normalisation for a single example.

    In eval mode on a CPU, with one example, torch (2.13) reads a gradient in channels-last order as if it were in
    row-major order. The stride of a first dimension of length one does not show the difference.
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
    """One backward pass per example by ``torch.autograd.grad``, which does not write ``.grad``."""

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate one example after the other. If an output depends on no selected parameter, it has zeros."""
        found = [self.one(batch, number) for number in range(batch.size)]
        return torch.cat([value for value, _ in found]), {
            name: torch.cat([rows[name] for _, rows in found]) for name in self.parameters
        }

    def alone(self, batch: ExampleBatch, number: int) -> Tensor:
        """The output of one example alone, shape ``(1,)``. The model may use autograd in its forward pass.

        Raises:
            ValueError: if the model accepts the batch but not the single example.
        """
        try:
            with torch.enable_grad():
                return self.outputs(batch.take([number]))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if not self._takes(batch):
                raise  # the model fails on the batch, too
            raise ValueError(
                f"{type(self.module).__name__} accepts a batch of {batch.size} examples but fails on one of them alone;"
                f" perhaps all examples share a part of the batch: {type(error).__name__}: {error}. Change the"
                " collate_fn so that every part has a row for each example, or use batch_size=1"
            ) from error

    def _require_trainable(self) -> None:
        frozen = [name for name, parameter in self.parameters.items() if not parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"the forward pass of {type(self.module).__name__} turned requires_grad off for {listed(frozen)}:"
                " freeze parameters before the forward pass, and leave these out with parameters="
            )

    def _takes(self, batch: ExampleBatch) -> bool:
        if batch.size < 2:
            return False
        try:
            with torch.enable_grad():
                self.outputs(batch)
        except Exception:  # any error; the error of the single example is raised
            return False
        return True

    def one(
        self, batch: ExampleBatch, number: int, original: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate one example of a batch, alone.

        Args:
            batch: the examples.
            number: the index of the example.
            original: the user's module. If it is given, two things are checked: the output reads nothing of it, and
                the only tensors with gradients that the output depends on are the copy's parameters.

        Returns:
            The output and gradients as for a batch of one example.

        Raises:
            ValueError: if the output is not one number, or depends on tensors outside the copy.
        """
        parameters = list(self.parameters.values())
        with differentiating(self.module, parameters), torch.enable_grad():
            value = self._sound(batch, number, original)
            if not value.requires_grad:
                nothing = (real_shape(parameter).numel() for parameter in parameters)
                return value, {n: value.new_zeros(1, size) for n, size in zip(self.parameters, nothing, strict=True)}
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        rows = (in_real_numbers(gradient).reshape(1, -1) for gradient in gradients)
        return value.detach(), dict(zip(self.parameters, rows, strict=True))

    def sound(self, batch: ExampleBatch, number: int, original: nn.Module) -> Tensor:
        """The output of one example alone, shape ``(1,)``, with the checks of :meth:`one`, but not differentiated."""
        with differentiating(self.module, self.parameters.values()), torch.enable_grad():
            return self._sound(batch, number, original).detach()

    def _sound(self, batch: ExampleBatch, number: int, original: nn.Module | None) -> Tensor:
        with apart_from(original, self.module) as made, _RightBatchNorm():
            value = self.alone(batch, number)
        self._require_one_each(value, 1)
        self._require_trainable()
        if original is not None:
            require_own_leaves(value, self.module, *modules_of(self.output), made=made)
        return value
