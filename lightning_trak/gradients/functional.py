"""Per-example gradients of a whole batch at once, by ``torch.func.vmap``."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_trak.gradients.base import GradientEngine
from lightning_trak.gradients.batch import map_batch
from lightning_trak.outputs import ModelOutput


class _OutputCall(nn.Module):
    """Makes ``output(module, batch)`` a forward, so that ``functional_call`` can swap parameters in any user code."""

    def __init__(self, module: nn.Module, output: ModelOutput) -> None:
        super().__init__()
        self.module = module
        self.output = output

    def forward(self, batch: Any) -> Tensor:
        return self.output.output(self.module, batch)


class FunctionalEngine(GradientEngine):
    """Vectorised gradients: ``vmap(grad_and_value(output))`` over the examples of a batch.

    Holds ``size x (selected parameters)`` numbers. Raises what ``vmap`` raises for models with data-dependent control
    flow; those need :class:`~lightning_trak.gradients.loop.LoopEngine`.
    """

    def __call__(self, batch: Any, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """All examples in one vectorised call."""
        call = _OutputCall(self.module, self.output)
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        map_batch(batch, size, collect, _refuse_list)

        def scalar(parameters: dict[str, Tensor], example: list[Tensor]) -> Tensor:
            remaining = iter(example)
            one = map_batch(batch, size, lambda _: next(remaining).unsqueeze(0), _refuse_list)
            swapped = {f"module.{self.names[name]}": parameter for name, parameter in parameters.items()}
            return self._one(functional_call(call, swapped, (one,)))

        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        # no_grad: torch.func tracks the selected parameters itself; autograd must not also record the others.
        # The math attention kernel is the one that vmap can batch.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            gradients, values = vmap(grad_and_value(scalar), in_dims=(None, 0))(parameters, tensors)
        return values, {name: gradient.reshape(size, -1) for name, gradient in gradients.items()}


def _refuse_list(items: Any) -> Any:
    raise TypeError(f"vmap cannot map over a list of {type(items[0]).__name__}; use engine='loop'")
