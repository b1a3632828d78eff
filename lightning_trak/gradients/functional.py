"""Per-example gradients of a whole batch at once, by ``torch.func.vmap``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_trak.gradients.base import EngineError, GradientEngine, in_real_numbers
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.substitution import Substituted


class FunctionalEngine(GradientEngine):
    """Vectorised gradients: ``vmap(grad_and_value(output))`` over the examples of a batch.

    Holds ``size x (selected parameters)`` numbers. Raises what ``vmap`` raises for models with data-dependent control
    flow; those need :class:`~lightning_trak.gradients.loop.LoopEngine`.
    """

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """All examples in one vectorised call."""

        def scalar(parameters: dict[str, Tensor], example: list[Tensor]) -> Tensor:
            remaining = iter(example)
            one = batch.rebuild(lambda _: next(remaining).unsqueeze(0), 1)
            with Substituted((self.parameters[name], tracked) for name, tracked in parameters.items()):
                values = self.outputs(ExampleBatch(one, 1, batch.layout))
            self._require_one_each(values, 1)
            return values.squeeze(0)

        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        # no_grad: torch.func tracks the selected parameters itself; autograd must not also record the others.
        # The math attention kernel is the one that vmap can batch.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                gradients, values = vmap(grad_and_value(scalar), in_dims=(None, 0))(parameters, batch.rows())
            except (torch.cuda.OutOfMemoryError, ValueError, TypeError):
                raise  # ours, or the user's: they say what is wrong themselves
            except Exception as error:
                raise self._translated(error) from error
        return values, {name: self._rows(gradient) for name, gradient in gradients.items()}

    def _translated(self, error: Exception) -> ValueError:
        """What an error inside vmap means."""
        name = type(self.module).__name__
        if "randomness" in str(error):
            return ValueError(
                f"the output of {name} is random in eval mode, so that it has no one gradient: draw from a fixed"
                " generator, or leave the noise out when not training"
            )
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return EngineError(f"vmap cannot differentiate {name}: {reason}")

    @staticmethod
    def _rows(gradient: Any) -> Tensor:
        return in_real_numbers(gradient).flatten(1)
