"""What every gradient engine does: gradients of the declared output, one row per example."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_trak.outputs import ModelOutput
from lightning_trak.projections.base import BoundProjection


@contextmanager
def differentiating(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only these of the module's parameters require gradients, for a while."""
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        module.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


class GradientEngine(ABC):
    """Per-example gradients of a model output.

    Call it outside inference mode, on a module in eval mode. The module's parameters, ``.grad`` and buffers are left
    alone.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``; only these are differentiated.
    """

    def __init__(self, module: nn.Module, output: ModelOutput, names: dict[str, str]) -> None:
        self.module = module
        self.output = output
        parameters = dict(module.named_parameters())
        self.parameters = {name: parameters[raw] for name, raw in names.items()}
        self.names = names

    @abstractmethod
    def __call__(self, batch: Any, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate each example's output.

        Args:
            batch: a batch without inference tensors.
            size: its number of examples.

        Returns:
            The outputs, shape ``(size,)``, and by canonical name the gradients, shape ``(size, numel)``.
        """

    def project(self, batch: Any, size: int, projection: BoundProjection, features: Tensor) -> Tensor:
        """Differentiate each example's output and add the projected gradients to its feature.

        Args:
            batch: a batch without inference tensors.
            size: its number of examples.
            projection: a projection that is bound to the parameters.
            features: features so far, shape ``(size, dim)``, float32 or float64; changed in place.

        Returns:
            The outputs, shape ``(size,)``.
        """
        values, gradients = self(batch, size)
        for name, rows in gradients.items():
            projection.add_(features, name, rows)
        return values

    def _require_gradient(self, value: Tensor) -> None:
        if not value.requires_grad:
            raise ValueError(
                f"{type(self.output).__name__}.output does not depend on any selected parameter"
                f" ({', '.join(self.parameters)}); choose others with parameters="
            )

    def _one(self, value: Tensor) -> Tensor:
        """The scalar of a batch of one, checked."""
        if value.shape != (1,):
            raise ValueError(
                f"{type(self.output).__name__}.output returned shape {tuple(value.shape)} for a batch of one example;"
                " expected (1,): one scalar per example"
            )
        return value.squeeze(0)
