"""Per-example gradients of a whole batch at once, by ``torch.func.vmap``."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_trak.gradients.already_tracked import AlreadyTracked
from lightning_trak.gradients.base import EngineError, GradientEngine, in_real_numbers
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.branches import CommonValues, DifferentValues
from lightning_trak.gradients.new_tensors import NewTensorsOfExamples
from lightning_trak.gradients.substitution import Substituted
from lightning_trak.texts.messages import in_one_line


class FunctionalEngine(GradientEngine):
    """Vectorised gradients: ``vmap(grad_and_value(output))`` over the examples of a batch.

    The gradients take ``size x (selected parameters)`` numbers of memory. If the model's control flow depends on data,
    the examples that take the same path are differentiated together. ``vmap`` cannot run models where almost every
    example takes a path of its own, nor tensors with a shape that depends on data; use
    :class:`~lightning_trak.gradients.loop.LoopEngine` for these.
    """

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """All examples in one vectorised call, or in one for each path through the model."""
        try:
            return self._vectorized(batch)
        except DifferentValues as paths:
            if len(paths.groups) > max(2, batch.size // 2):
                raise self._translated(paths) from paths
            numbers = torch.tensor([number for group in paths.groups for number in group], device=self.device)
            parts = [self(batch.take(group)) for group in paths.groups]
        order = numbers.argsort()
        values = torch.cat([values for values, _ in parts])[order]
        return values, {name: torch.cat([rows[name] for _, rows in parts])[order] for name in self.parameters}

    def _vectorized(self, batch: ExampleBatch, copied: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """All examples in one vectorised call.

        Args:
            batch: the examples.
            copied: whether each example has its own copy of the tensors that the forward pass makes.
        """

        def scalar(parameters: dict[str, Tensor], example: list[Tensor]) -> Tensor:
            remaining = iter(example)
            one = batch.rebuild(lambda _: next(remaining).unsqueeze(0), 1)
            replaced = ((self.parameters[name], tracked) for name, tracked in parameters.items())
            making = NewTensorsOfExamples(example[0]) if copied else nullcontext()
            with Substituted(replaced), CommonValues(), AlreadyTracked(), making:
                values = self.outputs(ExampleBatch(one, 1, batch.layout))
            self._require_one_each(values, 1)
            return values.squeeze(0)

        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        # no_grad: torch.func tracks the selected parameters itself, and autograd must not record the others.
        # vmap can batch the math attention kernel only.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                gradients, values = vmap(grad_and_value(scalar), in_dims=(None, 0))(parameters, batch.rows())
            except (torch.cuda.OutOfMemoryError, ValueError, TypeError, DifferentValues):
                raise  # errors of this package and of the user's code: their messages are clear already
            except Exception as error:
                if not copied:
                    with suppress(EngineError):  # the first error says more
                        return self._vectorized(batch, copied=True)
                raise self._translated(error) from error
        return values, {name: self._rows(gradient) for name, gradient in gradients.items()}

    def _translated(self, error: Exception) -> ValueError:
        """An error inside vmap as an error that says what to do."""
        name = type(self.module).__name__
        if "randomness" in str(error):
            return ValueError(
                f"the output of {name} is random in eval mode, so it has no unique gradient. Draw random numbers from a"
                " generator with a fixed seed, or leave the noise out in eval mode"
            )
        return EngineError(f"vmap cannot differentiate {name}: {in_one_line(error)}")

    @staticmethod
    def _rows(gradient: Any) -> Tensor:
        rows = in_real_numbers(gradient)
        return rows.reshape(len(rows), -1)  # a parameter may have no dimensions
