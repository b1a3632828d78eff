"""Per-example gradients one example at a time: slow, and right for any model that autograd can differentiate."""

from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients.base import GradientEngine
from lightning_trak.gradients.batch import slice_batch


class LoopEngine(GradientEngine):
    """One backward pass per example, through ``torch.autograd.grad`` (``.grad`` is never written)."""

    def __call__(self, batch: Any, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One example after the other."""
        values: list[Tensor] = []
        rows: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        flags = {name: parameter.requires_grad for name, parameter in self.module.named_parameters()}
        try:
            self.module.requires_grad_(False)
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)
            with torch.enable_grad():
                for i in range(size):
                    value = self._one(self.output.output(self.module, slice_batch(batch, size, i, i + 1)))
                    if not value.requires_grad:
                        raise ValueError(
                            f"{type(self.output).__name__}.output does not depend on any selected parameter"
                            f" ({', '.join(self.parameters)}); choose others with parameters="
                        )
                    gradients = torch.autograd.grad(
                        value, list(self.parameters.values()), allow_unused=True, materialize_grads=True
                    )
                    values.append(value.detach())
                    for name, gradient in zip(rows, gradients, strict=True):
                        rows[name].append(gradient.flatten())
        finally:
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(flags[name])
        return torch.stack(values), {name: torch.stack(gradients) for name, gradients in rows.items()}
