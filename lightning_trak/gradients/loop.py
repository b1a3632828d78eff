"""Per-example gradients one example at a time: slow, and right for any model that autograd can differentiate."""

from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients.base import GradientEngine, differentiating
from lightning_trak.gradients.batch import slice_batch


class LoopEngine(GradientEngine):
    """One backward pass per example, through ``torch.autograd.grad`` (``.grad`` is never written)."""

    def __call__(self, batch: Any, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One example after the other."""
        values: list[Tensor] = []
        rows: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        with differentiating(self.module, self.parameters.values()), torch.enable_grad():
            for i in range(size):
                value = self._one(self.output.output(self.module, slice_batch(batch, size, i, i + 1)))
                self._require_gradient(value)
                gradients = torch.autograd.grad(
                    value, list(self.parameters.values()), allow_unused=True, materialize_grads=True
                )
                values.append(value.detach())
                for name, gradient in zip(rows, gradients, strict=True):
                    rows[name].append(gradient.flatten())
        return torch.stack(values), {name: torch.stack(gradients) for name, gradients in rows.items()}
